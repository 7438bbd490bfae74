-- Raise the beat counter of an epoch, unless it was fenced. A node that came back is given jobs from the beat on that
-- its limit waits for.
--
-- KEYS     1 epochs, 2 beats, 3 draining, 4 limits
-- ARGV     1 list of the node, 2 epoch
-- Returns  'fenced', 'draining' or 'ok'

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 'fenced' end
local beats = redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
local awaited = string.match(redis.call('HGET', KEYS[4], ARGV[1]) or '', '^0 recovering (%d+)$')
if awaited and beats >= tonumber(awaited) then redis.call('HDEL', KEYS[4], ARGV[1]) end
if redis.call('SISMEMBER', KEYS[3], ARGV[1]) == 1 then return 'draining' end
return 'ok'
