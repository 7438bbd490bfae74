-- Let a request through to a provider, or say when to ask again: its breaker first, then its limits.
-- The breaker is that of cluster_tasks/breaker.py, on the clock of this Redis. The limits hold in any 60 seconds: the
-- request gets the first second that leaves room for it, and none before that of the request before it.
-- What lies further ahead than it ever could was written before the clock was set back, and is forgotten.
--
-- KEYS     1 breaker, 2 limits
-- ARGV     1 timeout_s, 2 success_threshold, 3 probe_lease_s, 4 requests a minute (0: any), 5 tokens a minute (0: any),
--          6 tokens that the request may take, 7 seconds that it may wait
-- Returns  {'admitted', generation, lease or '', seconds to wait, its second or ''},
--          {'open', seconds until it may ask again} or {'limited', seconds until it may ask again}

local LASTS_S, KEPT_S = 61, 86400
local clock = redis.call('TIME')
local now = clock[1] + math.floor(clock[2] / 1000) / 1000
local breaker = cjson.decode(redis.call('GET', KEYS[1]) or '{"generation":0,"successes":0}')
local leases = {}
if breaker.opened_at_s then
  if breaker.opened_at_s > now then
    breaker.opened_at_s = now
    redis.call('SET', KEYS[1], cjson.encode(breaker), 'EX', KEPT_S)
  end
  local left = breaker.opened_at_s + ARGV[1] - now
  if left > 0 then return {'open', tostring(left)} end
  for _, until_s in ipairs(breaker.leases or {}) do
    if until_s > now and until_s <= now + ARGV[7] + ARGV[3] + 1 then table.insert(leases, until_s) end
  end
  -- As many may have succeeded already where the threshold was lowered meanwhile: one more closes the breaker.
  local full = #leases >= math.max(ARGV[2] - breaker.successes, 1)
  if full then return {'open', tostring(math.min(unpack(leases)) - now)} end
end
local requests, tokens, more, wait, second = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), 0, ''
if requests + tokens > 0 then
  local seconds, oldest, sent, taken = {}, 1, 0, 0
  for _, entry in ipairs(cjson.decode(redis.call('GET', KEYS[2]) or '[]')) do
    if entry[1] + LASTS_S > now and entry[1] <= now + ARGV[7] then
      table.insert(seconds, entry)
      sent, taken = sent + entry[2], taken + entry[3]
    end
  end
  local last = seconds[#seconds] or {0, 0, 0}
  second = math.max(math.floor(now), last[1])
  while seconds[oldest] and (seconds[oldest][1] + LASTS_S <= second
      or (requests > 0 and sent + 1 > requests) or (tokens > 0 and taken + more > tokens)) do
    local gone = seconds[oldest]
    second, sent, taken, oldest = math.max(second, gone[1] + LASTS_S), sent - gone[2], taken - gone[3], oldest + 1
  end
  wait = math.max(0, second - now)
  if wait > tonumber(ARGV[7]) then return {'limited', tostring(wait)} end
  if last[1] == second then last[2], last[3] = last[2] + 1, last[3] + more
  else table.insert(seconds, {second, 1, more}) end
  redis.call('SET', KEYS[2], cjson.encode(seconds), 'EX', LASTS_S + math.ceil(wait))
end
local lease = ''
if breaker.opened_at_s then
  lease = string.format('%.3f', now + wait + ARGV[3])
  table.insert(leases, tonumber(lease))
  breaker.leases = leases
  redis.call('SET', KEYS[1], cjson.encode(breaker), 'EX', KEPT_S)
end
return {'admitted', breaker.generation, lease, tostring(wait), tostring(second)}
