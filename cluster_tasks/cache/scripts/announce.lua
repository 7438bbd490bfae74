-- Note that keys of a namespace, or all of it, have changed, and tell all processes.
--
-- KEYS     1 state of the namespace
-- ARGV     1 change, a new token; 2 generation, a new token if all of it is void, else ''; 3 channel;
--          4 namespace and keys, as JSON
-- Returns  the message: the change before, the change, the generation and ARGV[4], with a space between

local before = redis.call('HGET', KEYS[1], 'change') or '-'
redis.call('HSET', KEYS[1], 'change', ARGV[1])
if ARGV[2] ~= '' then
    redis.call('HSET', KEYS[1], 'generation', ARGV[2])
else
    -- There is none yet, or an eviction took it: then all that was stored under it is void.
    redis.call('HSETNX', KEYS[1], 'generation', ARGV[1])
end
local generation = redis.call('HGET', KEYS[1], 'generation')
local message = table.concat({before, ARGV[1], generation, ARGV[4]}, ' ')
redis.call('PUBLISH', ARGV[3], message)
return message
