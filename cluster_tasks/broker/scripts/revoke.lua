-- Remember that jobs are revoked. Each is at least as late as the one before, also when the clock of Redis was set back
-- meanwhile: nodes ask for what was revoked since the last one they know.
--
-- KEYS     1 revoked jobs
-- ARGV     1 seconds that each is remembered, 2 how many are, of which the oldest go; then job ids
-- Returns  nothing

local now = tonumber(redis.call('TIME')[1])
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
local at = math.max(now, tonumber(last or 0))
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], at, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[2] - 1)
