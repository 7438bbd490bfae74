-- Take a lock that nobody has, and give it a token.
--
-- KEYS     1 lock, 2 last token of all locks
-- ARGV     1 milliseconds that it lasts
-- Returns  the token, or '' if somebody has the lock

if redis.call('EXISTS', KEYS[1]) == 1 then return '' end

-- Microseconds since 1970, but always more than the one before: neither a clock that is set back nor a Redis that lost
-- its last second makes it fall.
local now = redis.call('TIME')
local token = math.max(tonumber(redis.call('GET', KEYS[2]) or 0), now[1] * 1000000 + now[2]) + 1
token = string.format('%.0f', token)
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], token, 'PX', ARGV[1])
return token
