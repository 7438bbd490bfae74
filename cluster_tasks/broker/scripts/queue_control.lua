-- Queue a control task, unless the last one of its name waits still.
--
-- KEYS     1 control list, 2 the last message of that name
-- ARGV     1 message
-- Returns  1 queued, 0 one waits

local last = redis.call('GET', KEYS[2])
if last and redis.call('LPOS', KEYS[1], last) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[1])
return 1
