-- Let a lease last longer, or give it back, if it still has the given token.
--
-- KEYS     1 lease
-- ARGV     1 token, 2 milliseconds that it lasts from now on; 0: it is given back
-- Returns  1, or 0 if it is of another token or of none

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
