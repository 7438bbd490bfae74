-- Let a lease last longer, give it back, or share it, if it still has the given token.
--
-- KEYS     1 lease
-- ARGV     1 token, 2 milliseconds that it lasts from now on, 0: it is given back; 3 its token from now on
-- Returns  1, or 0 if it is of another token or of none

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
return 1
