-- Note that a node has shards in its memory, if its epoch stands.
--
-- KEYS     1 epochs, 2 who is ready
-- ARGV     1 list of the node, 2 epoch, then one a shard: generation, shard and node
-- Returns  1, or 0 if another epoch stands, or none

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
for i = 3, #ARGV do redis.call('HSET', KEYS[2], ARGV[i], ARGV[2]) end
return 1
