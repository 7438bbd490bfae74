-- Forget that nodes have shards in their memories, as far as what stands there is what the caller knows.
--
-- KEYS     1 who is ready
-- ARGV     two a shard: generation, shard and node; epoch
-- Returns  how many were forgotten

local gone = 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then gone = gone + redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return gone
