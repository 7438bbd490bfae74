-- Note that deliveries are not worked on yet, provided that they stand: of an epoch that has ended nobody clears the
-- notes.
--
-- KEYS     1 hash of deliveries, 2 tags of those not started
-- ARGV     tags
-- Returns  how many were noted

local noted = 0
for _, tag in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], tag) == 1 then
    redis.call('SADD', KEYS[2], tag)
    noted = noted + 1
  end
end
return noted
