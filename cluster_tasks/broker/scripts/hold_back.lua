-- Note that a delivery is not worked on yet, provided that it stands: of an epoch that has ended nobody clears the notes.
--
-- KEYS     1 hash of deliveries, 2 tags of those not started
-- ARGV     1 tag
-- Returns  1 noted, 0 it is gone

if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SADD', KEYS[2], ARGV[1])
return 1
