-- Raise the beat counter of an epoch, unless it was fenced, and tell what has become of the cluster. A node that came back
-- is given jobs from the beat on that its limit waits for.
--
-- A node that waits at its doorbell looks for work by itself only now and then. One that those who ring could miss,
-- because it is not among the idle, and one that idles while something waits or is due is rung: to look is up to it.
--
-- KEYS     1 epochs, 2 beats, 3 draining, 4 limits, 5 idle, 6 backlog, 7 seats of those who observe, 8 revoked jobs,
--          9 revoked stamps, 10 delayed jobs, 11 its doorbell
-- ARGV     1 list of the node, 2 epoch, 3 '1' if it waits at its doorbell
-- Returns  'fenced', 'draining' or 'ok'; if not fenced, seats that are taken and a word that changes with what is revoked

local own = ARGV[1]
if redis.call('HGET', KEYS[1], own) ~= ARGV[2] then return { 'fenced', 0, '' } end
local beats = redis.call('HINCRBY', KEYS[2], own, 1)
local awaited = string.match(redis.call('HGET', KEYS[4], own) or '', '^0 recovering (%d+)$')
if awaited and beats >= tonumber(awaited) then redis.call('HDEL', KEYS[4], own) end

local function could_find_work()
  if not redis.call('ZSCORE', KEYS[5], own) or redis.call('EXISTS', KEYS[6]) == 1 then return true end
  return redis.call('ZCOUNT', KEYS[10], '-inf', redis.call('TIME')[1]) > 0
end

if ARGV[3] == '1' and could_find_work() and redis.call('EXISTS', KEYS[11]) == 0 then
  redis.call('LPUSH', KEYS[11], 1)
  redis.call('EXPIRE', KEYS[11], 60)
end
local last = redis.call('ZREVRANGE', KEYS[8], 0, 0, 'WITHSCORES')
local revoked = (last[2] or '') .. ' ' .. redis.call('SCARD', KEYS[9])
return {
  redis.call('SISMEMBER', KEYS[3], own) == 1 and 'draining' or 'ok', redis.call('ZCARD', KEYS[7]), revoked,
}
