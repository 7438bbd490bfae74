-- End an epoch for good, if its beat counter still is what the caller saw. In O(1): what the node held and listed is
-- renamed away, so that every later fetch, acknowledgement or commit of that epoch finds nothing.
--
-- KEYS     1 epochs, 2 beats, 3 serves, 4 draining, 5 backlog, 6 idle, 7 fenced epochs, 8 hash of its deliveries,
--          9 new name of that hash, 10 its doorbell
-- ARGV     1 list of the node, 2 epoch, 3 beat counter seen ('' for any), 4 member for the fenced epochs,
--          5 new name of the list; then the priority suffixes
-- Returns  1 fenced, 0 it beats or had ended already

local own = ARGV[1]
if redis.call('HGET', KEYS[1], own) ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' and redis.call('HGET', KEYS[2], own) ~= ARGV[3] then return 0 end

redis.call('SADD', KEYS[7], ARGV[4])
if redis.call('EXISTS', KEYS[8]) == 1 then redis.call('RENAME', KEYS[8], KEYS[9]) end
for i = 6, #ARGV do
  if redis.call('EXISTS', own .. ARGV[i]) == 1 then redis.call('RENAME', own .. ARGV[i], ARGV[5] .. ARGV[i]) end
end
redis.call('HDEL', KEYS[1], own)
redis.call('HDEL', KEYS[2], own)
redis.call('HDEL', KEYS[3], own)
redis.call('SREM', KEYS[4], own)
redis.call('ZREM', KEYS[5], own)
redis.call('ZREM', KEYS[6], own)
redis.call('DEL', KEYS[10])
return 1
