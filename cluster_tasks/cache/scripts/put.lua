-- Write an entry; what is being computed for its key is not stored.
--
-- KEYS     1 entry, 2 lease
-- ARGV     1 entry, 2 milliseconds that it is kept
-- Returns  1

redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
