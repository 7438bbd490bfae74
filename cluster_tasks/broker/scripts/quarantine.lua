-- Keep a job in quarantine, and forget those that have been there for too long or are too many, the oldest first. That
-- it came is told once, however often it is kept.
--
-- KEYS     1 quarantine, 2 when each came, 3 events
-- ARGV     1 seconds that a job is kept, 2 how many are kept, 3 job id ('' for none), 4 its record, 5 events to keep; then
--          fields and values of the event
-- Returns  how many were forgotten

local time = redis.call('TIME')
if ARGV[3] ~= '' then
  if redis.call('HSET', KEYS[1], ARGV[3], ARGV[4]) == 1 then
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', unpack(ARGV, 6))
  end
  redis.call('ZADD', KEYS[2], string.format('%d.%06d', time[1], time[2]), ARGV[3])
end
local surplus = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[2])
local old = redis.call('ZCOUNT', KEYS[2], '-inf', time[1] - tonumber(ARGV[1]))
if math.max(surplus, old) <= 0 then return 0 end
local forgotten = redis.call('ZRANGE', KEYS[2], 0, math.max(surplus, old) - 1)
for _, id in ipairs(forgotten) do
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
return #forgotten
