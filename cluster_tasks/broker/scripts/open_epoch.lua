-- Begin an epoch of a node, if none stands under its name.
--
-- KEYS     1 epochs, 2 beats, 3 serves, 4 draining, 5 counter of epochs, 6 names of tasks
-- ARGV     1 list of the node, 2 random characters, 3 the types it serves, as ",a,b,", 4 the tasks it knows, one a line
-- Returns  {'opened', epoch} or {'taken', epoch that stands, its beat counter}

local standing = redis.call('HGET', KEYS[1], ARGV[1])
if standing then
  return { 'taken', standing, redis.call('HGET', KEYS[2], ARGV[1]) or '0' }
end
local epoch = redis.call('INCR', KEYS[5]) .. '-' .. ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], epoch)
redis.call('HSET', KEYS[2], ARGV[1], 0)
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[6], ARGV[1], ARGV[4])
redis.call('SREM', KEYS[4], ARGV[1])
return { 'opened', epoch }
