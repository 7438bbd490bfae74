-- End an epoch for good, if its beat counter still is what the caller saw. In O(1): what the node held and listed is
-- renamed away, so that every later fetch, acknowledgement or commit of that epoch finds nothing. The event is told in
-- the same step: whoever ends an epoch may die before the next one.
--
-- KEYS     1 epochs, 2 beats, 3 serves, 4 draining, 5 backlog, 6 idle, 7 fenced epochs, 8 hash of its deliveries,
--          9 new name of that hash, 10 its doorbell, 11 names of tasks, 12 suspects that nodes hold, 13 limits,
--          14 mark that it was lost, 15 events, 16 counters
-- ARGV     1 list of the node, 2 epoch, 3 beat counter seen ('' for any), 4 field for the fenced epochs, 5 how it
--          ends, 6 new name of the list, 7 seconds that the mark lives ('0': it was not lost), 8 events to keep,
--          9 number of suffixes of all its lists; then the suffixes, and fields and values of the event (none: nothing
--          is told)
-- Returns  1 fenced, 0 it beats or had ended already

local own, first_field = ARGV[1], 10 + tonumber(ARGV[9])
if redis.call('HGET', KEYS[1], own) ~= ARGV[2] then return 0 end
if ARGV[3] ~= '' and redis.call('HGET', KEYS[2], own) ~= ARGV[3] then return 0 end

local listed = 0
for i = 10, first_field - 1 do
  listed = listed + redis.call('LLEN', own .. ARGV[i])
  if redis.call('EXISTS', own .. ARGV[i]) == 1 then redis.call('RENAME', own .. ARGV[i], ARGV[6] .. ARGV[i]) end
end
redis.call('HSET', KEYS[7], ARGV[4], ARGV[5] .. ' ' .. redis.call('HLEN', KEYS[8]) .. ' ' .. listed)
if redis.call('EXISTS', KEYS[8]) == 1 then redis.call('RENAME', KEYS[8], KEYS[9]) end
for _, hash in ipairs({ KEYS[1], KEYS[2], KEYS[3], KEYS[11], KEYS[12], KEYS[13] }) do redis.call('HDEL', hash, own) end
redis.call('HDEL', KEYS[3] .. ':zones', own)
redis.call('SREM', KEYS[4], own)
redis.call('ZREM', KEYS[5], own, own .. '.bound')
redis.call('ZREM', KEYS[6], own)
redis.call('ZREM', KEYS[6] .. ':coming', own)
redis.call('DEL', KEYS[10])
if ARGV[7] ~= '0' then
  redis.call('SET', KEYS[14], ARGV[2], 'EX', ARGV[7])
  redis.call('HINCRBY', KEYS[16], 'nodes_lost', 1)
end
if ARGV[first_field] then
  redis.call('XADD', KEYS[15], 'MAXLEN', '~', ARGV[8], '*', unpack(ARGV, first_field))
end
return 1
