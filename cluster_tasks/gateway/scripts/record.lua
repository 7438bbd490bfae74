-- Take in how a request to a provider ended, as cluster_tasks/breaker.py does, and the tokens that it took.
--
-- KEYS     1 breaker, 2 limits, 3 numbers of requests
-- ARGV     1 outcome, 2 generation and 3 lease of the permit, 4 failure_threshold, 5 success_threshold, 6 window,
--          7 window_s, 8 minimum_volume, 9 second of the request or '', 10 tokens beyond those it had asked for,
--          11 provider
-- Returns  'open' or 'closed' if this opened or closed the breaker, else ''

local KEPT_S = 86400
local clock = redis.call('TIME')
local now = clock[1] + math.floor(clock[2] / 1000) / 1000

redis.call('HINCRBY', KEYS[3], ARGV[1] .. ' ' .. ARGV[11], 1)
if ARGV[9] ~= '' and ARGV[10] ~= '0' then
  local seconds = cjson.decode(redis.call('GET', KEYS[2]) or '[]')
  for _, entry in ipairs(seconds) do
    if entry[1] == tonumber(ARGV[9]) then
      entry[3] = entry[3] + ARGV[10]
      redis.call('SET', KEYS[2], cjson.encode(seconds), 'KEEPTTL')
    end
  end
end

local breaker = cjson.decode(redis.call('GET', KEYS[1]) or '{"generation":0,"successes":0}')
local was, news = breaker.opened_at_s, ''
if breaker.generation ~= tonumber(ARGV[2]) then return '' end

if was and ARGV[1] == 'success' then breaker.successes = breaker.successes + 1 end
if was and breaker.successes >= tonumber(ARGV[5]) then
  breaker, news = {generation = breaker.generation + 1, successes = 0}, 'closed'
elseif was then
  for i, lease in ipairs(breaker.leases or {}) do
    if lease == tonumber(ARGV[3]) then table.remove(breaker.leases, i) break end
  end
elseif ARGV[1] ~= 'unknown' then
  local calls, failures = {}, 0
  for _, call in ipairs(breaker.calls or {}) do
    if call[1] > now - ARGV[7] then table.insert(calls, call) end
  end
  table.insert(calls, {now, ARGV[1] == 'failure'})
  while #calls > tonumber(ARGV[6]) do table.remove(calls, 1) end
  for _, call in ipairs(calls) do failures = failures + (call[2] and 1 or 0) end
  local full = #calls >= tonumber(ARGV[8]) and failures >= tonumber(ARGV[4])
  if full and ARGV[1] == 'failure' then news = 'open' end
  breaker.calls = calls
end
if news == 'open' or (was and ARGV[1] == 'failure') then
  breaker = {generation = breaker.generation + 1, successes = 0, opened_at_s = now}
end
redis.call('SET', KEYS[1], cjson.encode(breaker), 'EX', KEPT_S)
return news
