-- Set or lift the limit of a node, if epoch and limit are what the caller saw. One that takes a node out may be refused,
-- so that of all nodes, and of those of each type, at least half stay.
--
-- KEYS     1 epochs, 2 draining, 3 idle, 4 serves, 5 limits
-- ARGV     1 list of the node, 2 epoch, 3 limit seen ('' for none), 4 new limit ('' for none), 5 '1': only if half stay
-- Returns  1 done, 0 epoch or limit have changed, -1 too many are out

local own, seen, wanted = ARGV[1], ARGV[3], ARGV[4]
if redis.call('HGET', KEYS[1], own) ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[5], own) or '') ~= seen then return 0 end

if ARGV[5] == '1' then
  local out, total, all = {}, {}, redis.call('HGETALL', KEYS[4])
  for i = 1, #all, 2 do
    local limit = redis.call('HGET', KEYS[5], all[i]) or ''
    local is_out = all[i] == own or (limit ~= '' and not string.match(limit, '^%d+ ramping '))
      or redis.call('SISMEMBER', KEYS[2], all[i]) == 1
    -- Every node serves the type any; who serves no other is a coordinator.
    for kind in string.gmatch(all[i + 1] == ',any,' and '' or all[i + 1], '[^,]+') do
      total[kind] = (total[kind] or 0) + 1
      out[kind] = (out[kind] or 0) + (is_out and 1 or 0)
    end
  end
  for kind in string.gmatch(redis.call('HGET', KEYS[4], own), '[^,]+') do
    if not total[kind] or out[kind] * 2 > total[kind] then return -1 end
  end
end

if wanted == '' then redis.call('HDEL', KEYS[5], own) else redis.call('HSET', KEYS[5], own, wanted) end
if wanted ~= '' then redis.call('ZREM', KEYS[3], own) end
return 1
