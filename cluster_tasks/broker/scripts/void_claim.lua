-- Prepended to Celery's script that counts the parts of a chord, behind the line that storing.lua needs: who claimed to publish its body, and whose delivery
-- does not stand any more or is this very one, does not keep others from it until the claim expires.
--
-- KEYS     6 claim
-- ARGV     8 what a claim says: random characters, a space, hash of deliveries, a space, tag

local function stands(unacked, tag)
  if results_db ~= jobs_db then redis.call('SELECT', jobs_db) end
  local found = redis.call('HEXISTS', unacked, tag) == 1
  if results_db ~= jobs_db then redis.call('SELECT', results_db) end
  return found
end

do
  local claim = redis.call('GET', KEYS[6])
  local unacked, tag = string.match(claim or '', '^%S+ (%S+) (%S+)$')
  local own = string.match(ARGV[8], '^%S+ (.+)$')
  if unacked and (unacked .. ' ' .. tag == own or not stands(unacked, tag)) then
    redis.call('DEL', KEYS[6])
  end
end
