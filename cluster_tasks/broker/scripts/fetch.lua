-- Forget what a node acknowledged, then give it work: from the waiting lists of the types it serves, from its own
-- list, and from the longest lists of nodes that serve nothing it does not serve. What is given is recorded as held
-- in the same step. A node that gets less than it asked for counts as idle.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 hash of its deliveries
-- ARGV     1 its list, 2 its epoch, 3 how many jobs, 4 first part of the tags, 5 number of priority suffixes,
--          6 number of waiting lists; then the suffixes (most urgent first), the waiting lists, acknowledged tags
-- Returns  {'ok' | 'fenced' | 'draining', tag, message, tag, message, …}

local own, epoch, want = ARGV[1], ARGV[2], tonumber(ARGV[3])
local first_waiting = 7 + tonumber(ARGV[5])
local first_acked = first_waiting + tonumber(ARGV[6])

for i = first_acked, #ARGV, 1000 do
  redis.call('HDEL', KEYS[6], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
if redis.call('HGET', KEYS[1], own) ~= epoch then return { 'fenced' } end
if redis.call('SISMEMBER', KEYS[2], own) == 1 then
  redis.call('ZREM', KEYS[4], own)
  return { 'draining' }
end

local reply, given = { 'ok' }, 0

local function take(list, most)
  local taken = 0
  for i = 7, first_waiting - 1 do
    local left = math.min(want - given, most - taken)
    if left <= 0 then break end
    for _, message in ipairs(redis.call('RPOP', list .. ARGV[i], left) or {}) do
      taken, given = taken + 1, given + 1
      local tag = ARGV[4] .. given
      redis.call('HSET', KEYS[6], tag, message)
      reply[#reply + 1] = tag
      reply[#reply + 1] = message
    end
  end
  local counted = redis.call('ZSCORE', KEYS[3], list)
  if counted and (taken == 0 or tonumber(redis.call('ZINCRBY', KEYS[3], -taken, list)) <= 0) then
    redis.call('ZREM', KEYS[3], list)
  end
  return taken
end

local function covered(types, others)
  if types == others then return true end
  for kind in string.gmatch(others, '[^,]+') do
    if not string.find(types, ',' .. kind .. ',', 1, true) then return false end
  end
  return true
end

local function longest_peer(types)
  for page = 0, redis.call('ZCARD', KEYS[3]), 32 do
    for _, list in ipairs(redis.call('ZREVRANGE', KEYS[3], page, page + 31)) do
      local others = list ~= own and redis.call('HGET', KEYS[5], list)
      if others and covered(types, others) then return list end
    end
  end
end

for i = first_waiting, first_acked - 1 do
  if given < want and redis.call('ZSCORE', KEYS[3], ARGV[i]) then take(ARGV[i], want) end
end
if given < want then take(own, want) end
local types = redis.call('HGET', KEYS[5], own)
while given < want do
  local peer = types and longest_peer(types)
  if not peer then break end
  take(peer, 1)
end

if given < want then
  redis.call('ZADD', KEYS[4], 'NX', redis.call('TIME')[1], own)
else
  redis.call('ZREM', KEYS[4], own)
end
return reply
