-- Take the right to compute a key.
--
-- KEYS     1 lease
-- ARGV     1 token, 2 milliseconds that it lasts, 3 how the token of a shared lease begins;
--          4 1: take it from whoever has it
-- Returns  the token of the lease that the caller has now; '' if it is another's

local held = redis.call('GET', KEYS[1])
-- One that never runs out is somebody else's key.
if held and redis.call('PTTL', KEYS[1]) < 0 then held = false end
if held and ARGV[4] ~= '1' then return held:sub(1, #ARGV[3]) == ARGV[3] and held or '' end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
