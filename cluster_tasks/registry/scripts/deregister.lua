-- Forget a node if its record is of the given epoch, and tell that it left.
--
-- KEYS  1 nodes   2 loads   3 stream of node events
-- ARGV  1 node id   2 time of the event   3 events to keep   4 epoch
-- Returns  1 if the node was forgotten, else 0
local id, epoch = ARGV[1], ARGV[4]
local record = redis.call('HGET', KEYS[1], id)
local state = redis.call('HGET', KEYS[2], id)
if not (record and state) or string.match(record, '\n(.*)') ~= epoch then
  return 0
end

redis.call('HDEL', KEYS[1], id)
redis.call('HDEL', KEYS[2], id)
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*',
  'type', 'left', 'id', id, 'record', record, 'state', state, 'at', ARGV[2])
return 1
