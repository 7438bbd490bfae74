-- Change the assignment of shards, unless it was changed since the caller read it, and tell of it.
--
-- KEYS     1 assignment, 2 its version, 3 events
-- ARGV     1 version that was read ('' for none), 2 new version, 3 events kept, 4 number of parts of the event,
--          then those, name and value in turn; then collection and holders ('' for none) in turn
-- Returns  1, or 0 if the version is another

if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
local event, last = {}, 4 + tonumber(ARGV[4])
for i = 5, last do event[#event + 1] = ARGV[i] end
for i = last + 1, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', KEYS[1], ARGV[i])
  else
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
if #event > 0 then redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', unpack(event)) end
return 1
