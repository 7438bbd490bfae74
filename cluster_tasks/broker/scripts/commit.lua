-- End a job: write its result and remove its delivery, provided that the delivery still stands and that nothing has
-- ended the job before. Repeating it for the same delivery changes nothing.
--
-- KEYS     1 hash of deliveries, 2 marker that the job has ended, 3 result, 4 counters
-- ARGV     1 tag of the delivery, 2 result, 3 seconds that result and marker live (0: for ever),
--          4 '1' to leave the delivery in place, because something follows the result
-- Returns  1 committed, 0 refused: the delivery is gone, -1 refused: the job had ended

local ended_by = redis.call('GET', KEYS[2])
if ended_by == ARGV[1] then return 1 end
local stands = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
if ended_by or not stands then
  redis.call('HINCRBY', KEYS[4], 'stale_commits', 1)
  return stands and -1 or 0
end

local ttl = tonumber(ARGV[3])
if ttl > 0 then
  redis.call('SET', KEYS[2], ARGV[1], 'EX', ttl)
  redis.call('SET', KEYS[3], ARGV[2], 'EX', ttl)
else
  redis.call('SET', KEYS[2], ARGV[1])
  redis.call('SET', KEYS[3], ARGV[2])
end
redis.call('PUBLISH', KEYS[3], ARGV[2])
if ARGV[4] ~= '1' then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
