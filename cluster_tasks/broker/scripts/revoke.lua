-- Remember that jobs are revoked. Those of a call are later than those of the one before, also when the clock of Redis was
-- set back meanwhile: nodes ask for what was revoked since the last one they know, when there is a later one.
--
-- KEYS     1 revoked jobs
-- ARGV     1 seconds that each is remembered, 2 how many are, of which the oldest go; then job ids
-- Returns  nothing

local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
local at = string.format('%.6f', math.max(now, tonumber(last or 0) + 0.000002))
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], at, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[2] - 1)
