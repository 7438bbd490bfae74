-- Write how far a job has come, provided that its delivery still stands and that nothing has ended the job.
--
-- KEYS     1 hash of deliveries, 2 marker that the job has ended, 3 result
-- ARGV     1 tag of the delivery, 2 state and what belongs to it, 3 seconds that it lives (0: for ever)
-- Returns  1 written, 0 passed over

if redis.call('EXISTS', KEYS[2]) == 1 or redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
store(KEYS[3], ARGV[2], ARGV[3])
return 1
