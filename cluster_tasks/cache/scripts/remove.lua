-- Delete an entry; what is being computed for its key is not stored.
--
-- KEYS     1 entry, 2 lease
-- Returns  1, or 0 if there was none

redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
