-- Add what a node has counted to its own numbers and to those of the cluster, once, however often it is told.
--
-- KEYS     1 numbers of the cluster, 2 numbers of the node
-- ARGV     1 the batch, 2 seconds that the numbers of a silent node live, 3 how many counters follow; then their names
--          and by how much they grow; then names and values of what is no counter
-- Returns  1 added, 0 it had been before

local first_gauge = 4 + 2 * ARGV[3]
if redis.call('HGET', KEYS[2], 'batch') == ARGV[1] then return 0 end
for i = 4, first_gauge - 1, 2 do
  redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
  redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[2], 'batch', ARGV[1], unpack(ARGV, first_gauge))
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
