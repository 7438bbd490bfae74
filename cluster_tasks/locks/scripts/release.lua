-- Give a lock back, if it still has the given token.
--
-- KEYS     1 lock
-- ARGV     1 token
-- Returns  1, or 0 if it is of another token or of none

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
