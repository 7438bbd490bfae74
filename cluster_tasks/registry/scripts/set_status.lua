-- Change the status of a node and keep its load; tell it if the status is another.
--
-- KEYS  1 nodes   2 loads   3 stream of node events
-- ARGV  1 node id   2 time of the event   3 events to keep   4 status
-- Returns  1, or 0 if the node is not registered
local id = ARGV[1]
local record = redis.call('HGET', KEYS[1], id)
local old_state = redis.call('HGET', KEYS[2], id)
if not (record and old_state) then
  return 0
end

local state = string.match(old_state, '^[^\n]*') .. '\n' .. ARGV[4]
if state ~= old_state then
  redis.call('HSET', KEYS[2], id, state)
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*',
    'type', 'updated', 'id', id, 'record', record, 'state', state, 'at', ARGV[2])
end
return 1
