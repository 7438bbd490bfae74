-- Raise the beat counter of an epoch, unless it was fenced.
--
-- KEYS     1 epochs, 2 beats, 3 draining
-- ARGV     1 list of the node, 2 epoch
-- Returns  'fenced', 'draining' or 'ok'

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 'fenced' end
redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
if redis.call('SISMEMBER', KEYS[3], ARGV[1]) == 1 then return 'draining' end
return 'ok'
