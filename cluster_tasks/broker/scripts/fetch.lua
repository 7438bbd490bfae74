-- Forget what a node acknowledged, then give it work: one suspect if it holds none, from the waiting lists of the types
-- it serves, from its own lists, and from the longest lists of nodes that serve nothing it does not serve; and if all
-- that is not enough, the hedges that it is to do. What is given is recorded as held in the same step. A node that gets
-- less than it asked for counts as idle.
--
-- A job that says with which others it can be done in one call (`"cluster_batch": "64 name"`) brings those along that
-- follow it in its list and say the same, up to so many, and fills one place with them. What waits is shared: between
-- all the places that are free here, and the nodes that are idle.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 hash of its deliveries,
--          8 delayed jobs, 9 suspects that nodes hold, 10 last fencing token, 11 its hedges by due time, 12 their messages,
--          13 counters
-- ARGV     1 prefix of the doorbells, 2 its list, 3 its epoch, 4 how many jobs, 5 first part of the tags, which end
--          with a fencing token, 6 number of priority suffixes, 7 number of waiting lists; then the suffixes (most
--          urgent first), the waiting lists, the waiting lists of suspects (as many), and three an acknowledged delivery:
--          tag, marker that its job has ended, what was kept of that end
-- Returns  {'ok' | 'fenced' | 'draining' | 'limited' and its trial, milliseconds until the next delayed job or hedge or '', tag,
--          message, tag, message, …}; the tag of a job that shares the place of the one before it has '+' in front

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
local own, epoch, want = ARGV[2], ARGV[3], tonumber(ARGV[4])
local first_waiting = 8 + tonumber(ARGV[6])
local first_suspect = first_waiting + tonumber(ARGV[7])
local first_acked = first_suspect + tonumber(ARGV[7])
-- Of the messages that are done in one call: they are also handed to a process together.
local BATCH_BYTES = 256 * 1024
local COMING_S = 1

for i = first_acked, #ARGV, 3 do
  let_go(KEYS[7], ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
if redis.call('HGET', keys.epochs, own) ~= epoch then return { 'fenced', '' } end
redis.call('ZREM', keys.idle .. ':coming', own)
if redis.call('SISMEMBER', keys.draining, own) == 1 then
  redis.call('ZREM', keys.idle, own)
  return { 'draining', '' }
end
local status, limit, probe = 'ok', redis.call('HGET', keys.limits, own), nil
if limit then
  local slots, phase, trial, probes = string.match(limit, '^(%d+) (%S+) (%S+) ?(%d*)')
  status = phase == 'recovering' and 'limited' or 'limited ' .. trial
  probe = phase == 'half-open' and '0 probing ' .. trial .. ' ' .. probes + 1
  -- What it holds from before, and may never end, keeps no probe from it.
  want = math.min(want, probe and 1 or slots - redis.call('HLEN', KEYS[7]))
  if want <= 0 then
    redis.call('ZREM', keys.idle, own)
    return { status, '' }
  end
end

promote(keys, KEYS[8], 100, own)
local reply, given, token = { status, next_due_ms(KEYS[8]) }, 0, nil

-- Microseconds since 1970, but always more than the one before: neither a clock that is set back nor a Redis that lost
-- its last second makes it fall.
local function next_tag()
  if not token then
    local now = redis.call('TIME')
    token = math.max(tonumber(redis.call('GET', KEYS[10]) or 0), now[1] * 1000000 + now[2])
  end
  token = token + 1
  return ARGV[5] .. string.format('%.0f', token)
end

local function give(message, mark)
  local tag = next_tag()
  reply[#reply + 1] = (mark or '') .. tag
  reply[#reply + 1] = message
  redis.call('HSET', KEYS[7], tag, message)
end

local function batch_of(message)
  local _, at = string.find(message, '"cluster_batch": "', 1, true)
  return at and string.match(message, '^[^"]+', at + 1)
end

-- How many other nodes have nothing to do: those that say so, and those that were rung just now.
local idle_peers
local function idle()
  if not idle_peers then
    local now, coming = redis.call('TIME'), keys.idle .. ':coming'
    redis.call('ZREMRANGEBYSCORE', coming, '-inf', now[1] + now[2] / 1000000 - COMING_S)
    local waits_here = redis.call('ZSCORE', keys.idle, own) and 1 or 0
    idle_peers = redis.call('ZCARD', keys.idle) - waits_here + redis.call('ZCARD', coming)
  end
  return idle_peers
end

-- Give what can be done with the job just given, `behind` others from the same list waiting for the same. Returns how many.
local function give_beside(list, first, behind)
  local batch = batch_of(first)
  local most = batch and tonumber(string.match(batch, '^%d+'))
  if not most or limit then return 0 end
  local share = math.floor(redis.call('LLEN', list) / (1 + behind + idle()))
  local number = math.min(most - 1, share)
  if number < 1 then return 0 end
  local waiting, bytes, beside = redis.call('LRANGE', list, -number, -1), #first, 0
  for i = #waiting, 1, -1 do
    bytes = bytes + #waiting[i]
    if bytes > BATCH_BYTES or batch_of(waiting[i]) ~= batch then break end
    beside = beside + 1
    give(waiting[i], '+')
  end
  if beside > 0 then redis.call('RPOP', list, beside) end
  return beside
end

local function take(list, most, alone)
  local taken, places = 0, 0
  for i = 8, first_waiting - 1 do
    local name, left = list .. ARGV[i], math.min(want - given, most - places)
    if left <= 0 then break end
    local messages = redis.call('RPOP', name, left) or {}
    places, given = places + #messages, given + #messages
    for n, message in ipairs(messages) do
      give(message)
      taken = taken + 1 + (alone and 0 or give_beside(name, message, #messages - n))
    end
  end
  local counted = redis.call('ZSCORE', keys.backlog, list)
  if counted and (taken == 0 or tonumber(redis.call('ZINCRBY', keys.backlog, -taken, list)) <= 0) then
    redis.call('ZREM', keys.backlog, list)
  end
  return taken
end

local function longest_peer(types)
  for page = 0, redis.call('ZCARD', keys.backlog), 32 do
    for _, list in ipairs(redis.call('ZREVRANGE', keys.backlog, page, page + 31)) do
      local others = list ~= own and redis.call('HGET', keys.serves, list)
      if others and covers(types, others) then return list end
    end
  end
end

local suspect = redis.call('HGET', KEYS[9], own)
if not probe and (not suspect or redis.call('HEXISTS', KEYS[7], suspect) == 0) then
  for i = first_suspect, first_acked - 1 do
    if given < want and redis.call('ZSCORE', keys.backlog, ARGV[i]) and take(ARGV[i], 1, true) == 1 then
      redis.call('HSET', KEYS[9], own, reply[#reply - 1])
      break
    end
  end
end
for i = first_waiting, first_suspect - 1 do
  if given < want and redis.call('ZSCORE', keys.backlog, ARGV[i]) then take(ARGV[i], want) end
end
if given < want and redis.call('ZSCORE', keys.backlog, own .. '.bound') then take(own .. '.bound', want) end
if given < want then take(own, want) end
local types = redis.call('HGET', keys.serves, own)
while given < want do
  local peer = types and longest_peer(types)
  if not peer then break end
  if take(peer, 1) == 1 then hand_over_hedge(keys, KEYS[11], KEYS[12], own, peer, reply[#reply]) end
end
-- What it could take is on no list any more: who is late with a hedged job holds it.
if given < want and not probe then
  local hedges = due_hedges(KEYS[11], KEYS[12], want - given, KEYS[7])
  for _, message in ipairs(hedges) do give(message) end
  given = given + #hedges
  if #hedges > 0 then redis.call('HINCRBY', KEYS[13], 'hedges', #hedges) end
  if given < want then reply[2] = sooner(reply[2], next_due_ms(KEYS[11])) end
end

if token then redis.call('SET', KEYS[10], string.format('%.0f', token)) end
if probe and given > 0 then redis.call('HSET', keys.limits, own, probe) end
if given < want and not probe then
  redis.call('ZADD', keys.idle, 'NX', redis.call('TIME')[1], own)
else
  redis.call('ZREM', keys.idle, own)
end
return reply
