-- What BRPOP does, without waiting: Redis 6.2 takes a very short time-out of BRPOP for none.
--
-- KEYS     lists, the most urgent first
-- Returns  {list, message} of the first that is not empty, or nothing

for _, list in ipairs(KEYS) do
  local message = redis.call('RPOP', list)
  if message then return { list, message } end
end
return false
