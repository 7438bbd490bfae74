-- Set or lift the limit of a node, if epoch and limit are what the caller saw. At least half of all nodes, and of those
-- of each type, are to stay: one that takes a node out may be refused for that, and one that lets it in be done for that.
--
-- KEYS     1 epochs, 2 draining, 3 idle, 4 serves, 5 limits
-- ARGV     1 list of the node, 2 epoch, 3 limit seen ('' for none), 4 new limit ('' for none), 5 '1': only if half stay
--          when it is out, '0': only if they do not, '': whatever stays
-- Returns  1 done, 0 epoch or limit have changed, -1 refused for the number that stays

local own, seen, wanted = ARGV[1], ARGV[3], ARGV[4]
if redis.call('HGET', KEYS[1], own) ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[5], own) or '') ~= seen then return 0 end

local function is_out(node)
  local phase = string.match(redis.call('HGET', KEYS[5], node) or '', '^%d+ (%S+)')
  return node == own or (phase and phase ~= 'ramping' and phase ~= 'recovering')
    or redis.call('SISMEMBER', KEYS[2], node) == 1
end

local function half_stay()
  local out, total, all = {}, {}, redis.call('HGETALL', KEYS[4])
  for i = 1, #all, 2 do
    -- Every node serves the type any; who serves no other is a coordinator.
    for kind in string.gmatch(all[i + 1] == ',any,' and '' or all[i + 1], '[^,]+') do
      total[kind] = (total[kind] or 0) + 1
      out[kind] = (out[kind] or 0) + (is_out(all[i]) and 1 or 0)
    end
  end
  for kind in string.gmatch(redis.call('HGET', KEYS[4], own), '[^,]+') do
    if not total[kind] or out[kind] * 2 > total[kind] then return false end
  end
  return true
end

if ARGV[5] ~= '' and half_stay() ~= (ARGV[5] == '1') then return -1 end
if wanted == '' then redis.call('HDEL', KEYS[5], own) else redis.call('HSET', KEYS[5], own, wanted) end
if wanted ~= '' then redis.call('ZREM', KEYS[3], own) end
return 1
