-- Take or keep one of a few seats, those of the nodes that observe all others; tell how many checks coordinators ran.
--
-- KEYS     1 seats by when they end, 2 number of checks
-- ARGV     1 node id, 2 seats there are, 3 ms for which one is kept
-- Returns  1 it has a seat or 0, then the number of checks

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
-- Seats that were given before the clock was set back would be kept by the dead.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. string.format('%d', now + ARGV[3]), '+inf')
local seated = redis.call('ZSCORE', KEYS[1], ARGV[1]) or redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[2])
if seated then
  redis.call('ZADD', KEYS[1], string.format('%d', now + ARGV[3]), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return { seated and 1 or 0, tonumber(redis.call('GET', KEYS[2]) or 0) }
