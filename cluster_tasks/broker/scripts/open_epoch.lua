-- Begin an epoch of a node, if none stands under its name. One that comes back after it was lost is limited to no jobs
-- until it has beaten a few times.
--
-- KEYS     1 epochs, 2 beats, 3 serves, 4 draining, 5 counter of epochs, 6 names of tasks, 7 limits,
--          8 mark that it was lost, 9 epochs that were begun
-- ARGV     1 list of the node, 2 random characters, 3 the types it serves, as ",a,b,", 4 the tasks it knows, one a
--          line, 5 beats that are few, 6 id of the node, 7 its zone ('' for none)
-- Returns  {'opened', epoch} or {'taken', epoch that stands, its beat counter}

local standing = redis.call('HGET', KEYS[1], ARGV[1])
if standing then
  return { 'taken', standing, redis.call('HGET', KEYS[2], ARGV[1]) or '0' }
end
local epoch = redis.call('INCR', KEYS[5]) .. '-' .. ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], epoch)
redis.call('SADD', KEYS[9], ARGV[6] .. '/' .. epoch)
redis.call('HSET', KEYS[2], ARGV[1], 0)
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
if ARGV[7] ~= '' then redis.call('HSET', KEYS[3] .. ':zones', ARGV[1], ARGV[7]) end
redis.call('HSET', KEYS[6], ARGV[1], ARGV[4])
redis.call('SREM', KEYS[4], ARGV[1])
if redis.call('DEL', KEYS[8]) == 1 and tonumber(ARGV[5]) > 0 then
  redis.call('HSET', KEYS[7], ARGV[1], '0 recovering ' .. ARGV[5])
end
return { 'opened', epoch }
