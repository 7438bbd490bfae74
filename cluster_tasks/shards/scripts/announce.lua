-- Note how a collection is divided, or that it is no more, unless a later generation of it is known.
--
-- KEYS     1 collections
-- ARGV     1 collection, 2 generation, 3 number of shards; 0: it is no more
-- Returns  1 if that was news, else 0

local held = redis.call('HGET', KEYS[1], ARGV[1])
local known = ARGV[2] .. ' ' .. ARGV[3]
if held == known or (held and tonumber(string.match(held, '^%d+')) > tonumber(ARGV[2])) then return 0 end
if ARGV[3] == '0' then return redis.call('HDEL', KEYS[1], ARGV[1]) end
redis.call('HSET', KEYS[1], ARGV[1], known)
return 1
