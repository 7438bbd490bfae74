-- Store what was computed under a lease, unless the key was written, deleted or leased anew meanwhile.
--
-- KEYS     1 entry, 2 lease
-- ARGV     1 token of the lease, 2 entry, 3 milliseconds that it is kept
-- Returns  1, or 0 if nothing was stored

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
