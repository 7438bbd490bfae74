-- Renew the load and status of a node; tell it if the status is another.
--
-- KEYS  1 nodes   2 loads   3 stream of node events
-- ARGV  1 node id   2 time of the event   3 events to keep   4 load, newline, status
-- Returns  1, or 0 if the node is not registered
local id, state = ARGV[1], ARGV[4]
local record = redis.call('HGET', KEYS[1], id)
local old_state = redis.call('HGET', KEYS[2], id)
if not (record and old_state) then
  return 0
end

redis.call('HSET', KEYS[2], id, state)
if string.match(old_state, '\n(.*)') ~= string.match(state, '\n(.*)') then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*',
    'type', 'updated', 'id', id, 'record', record, 'state', state, 'at', ARGV[2])
end
return 1
