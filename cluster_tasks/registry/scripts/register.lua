-- Make a node known, in place of an earlier record of its id, and tell what changed.
--
-- KEYS  1 nodes   2 loads   3 stream of node events
-- ARGV  1 node id   2 time of the event   3 events to keep   4 record, newline, epoch   5 load, newline, status
-- Returns  1
local id, record, state = ARGV[1], ARGV[4], ARGV[5]

local function word(value)
  return string.match(value, '\n(.*)')
end

local function tell(what, of_record, of_state)
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*',
    'type', what, 'id', id, 'record', of_record, 'state', of_state, 'at', ARGV[2])
end

local old_record = redis.call('HGET', KEYS[1], id)
local old_state = redis.call('HGET', KEYS[2], id)
redis.call('HSET', KEYS[1], id, record)
redis.call('HSET', KEYS[2], id, state)

local known = old_record and old_state
local same_epoch = known and word(old_record) == word(record)
if known and not same_epoch then
  tell('left', old_record, old_state)
end
if not same_epoch then
  tell('joined', record, state)
elseif old_record ~= record or word(old_state) ~= word(state) then
  tell('updated', record, state)
end
return 1
