-- End a job that no node holds, as a revocation does, provided that nothing has ended it before.
--
-- KEYS     1 marker that the job has ended, 2 result
-- ARGV     1 what the marker says, 2 result, 3 seconds that result and marker live (0: for ever)
-- Returns  1 ended, 0 it had ended

if not redis.call('SET', KEYS[1], ARGV[1], 'NX') then return 0 end
if tonumber(ARGV[3]) > 0 then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
store(KEYS[2], ARGV[2], ARGV[3])
return 1
