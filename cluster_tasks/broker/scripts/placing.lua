-- Shared by every script that puts a message on a list; it is prepended to them and returns nothing itself.
--
-- place() pushes a message to the list of a node that may work, else to the waiting list that is named with it, keeps
-- the index of non-empty lists, and rings one doorbell: that of a node in the zone of the chosen one, if one idles there.
-- A node that may not work has no epoch, is draining, or has a limit under which nothing is placed on it: all but that
-- of a node which ramps up.
--
-- keys   epochs, draining, backlog, idle, serves, limits, bells (prefix of the doorbells)
-- queue  list of the node that was chosen, '' for none; from one that ends with .bound no other node takes
-- push   'LPUSH' behind the others, 'RPUSH' before them

local function serves(types, kind)
  return types and string.find(types, ',' .. kind .. ',', 1, true)
end

local function covers(types, others)
  if types == others then return true end
  if not types or not others then return false end
  for kind in string.gmatch(others, '[^,]+') do
    if not serves(types, kind) then return false end
  end
  return true
end

local function zone_of(keys, queue)
  return queue ~= '' and redis.call('HGET', keys.serves .. ':zones', queue) or nil
end

-- The node that has idled longest and serves `kind`, of `zone` if that is given; first choice is one that may take from
-- the list `queue`.
local function idle_node_of(keys, kind, queue, zone)
  local wanted = queue ~= '' and redis.call('HGET', keys.serves, queue)
  local second
  for page = 0, redis.call('ZCARD', keys.idle), 32 do
    local names = redis.call('ZRANGE', keys.idle, page, page + 31)
    local zones = zone and #names > 0 and redis.call('HMGET', keys.serves .. ':zones', unpack(names))
    for i, name in ipairs(names) do
      local types = (not zone or zones[i] == zone) and redis.call('HGET', keys.serves, name)
      if serves(types, kind) and redis.call('SISMEMBER', keys.draining, name) == 0 then
        if not wanted or covers(types, wanted) then return name, true end
        second = second or name
      end
    end
  end
  return second, false
end

-- The same of any zone, but of `zone` if one idles there.
local function idle_node(keys, kind, queue, zone)
  if zone then
    local near, may_take = idle_node_of(keys, kind, queue, zone)
    if near then return near, may_take end
  end
  return idle_node_of(keys, kind, queue, nil)
end

-- A node that was rung is idle no more, and has fetched nothing yet: for a moment it is among those that come.
local function ring(keys, queue)
  local now, coming = redis.call('TIME'), keys.idle .. ':coming'
  redis.call('ZREM', keys.idle, queue)
  redis.call('ZADD', coming, now[1] + now[2] / 1000000, queue)
  redis.call('EXPIRE', coming, 60)
  redis.call('LPUSH', keys.bells .. queue, 1)
  redis.call('EXPIRE', keys.bells .. queue, 60)
end

local function may_get(keys, queue, node)
  if redis.call('HEXISTS', keys.epochs, node) == 0 or redis.call('SISMEMBER', keys.draining, node) == 1 then
    return false
  end
  -- What is bound to a node runs nowhere else, so it waits there.
  local limit = queue == node and redis.call('HGET', keys.limits, node)
  return not limit or string.match(limit, '^%d+ ramping ') ~= nil
end

local function place(keys, queue, waiting, kind, suffix, message, push)
  local node = string.gsub(queue, '%.bound$', '')
  if not may_get(keys, queue, node) then queue = '' end
  local target, listener = queue, node
  if queue == '' then
    target, listener = waiting, (idle_node(keys, kind, '', zone_of(keys, node)))
  elseif not redis.call('ZSCORE', keys.idle, node) then
    listener = nil
    if queue == node then
      local idle, may_take = idle_node(keys, kind, queue, zone_of(keys, node))
      listener = idle
      -- It could run the job but may not take it from that list, where other types wait: hand it over now.
      if idle and not may_take then target = idle end
    end
  end
  redis.call(push, target .. suffix, message)
  redis.call('ZINCRBY', keys.backlog, 1, target)
  if listener then ring(keys, listener) end
  return target
end
