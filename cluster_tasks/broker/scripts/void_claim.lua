-- Prepended to Celery's script that counts the parts of a chord: who claimed to publish its body, and whose delivery
-- does not stand any more or is this very one, does not keep others from it until the claim expires.
--
-- KEYS     6 claim
-- ARGV     8 what a claim says: random characters, a space, hash of deliveries, a space, tag

do
  local claim = redis.call('GET', KEYS[6])
  local unacked, tag = string.match(claim or '', '^%S+ (%S+) (%S+)$')
  local own = string.match(ARGV[8], '^%S+ (.+)$')
  if unacked and (unacked .. ' ' .. tag == own or redis.call('HEXISTS', unacked, tag) == 0) then
    redis.call('DEL', KEYS[6])
  end
end
