-- Throw away what waits in a list, all priorities.
--
-- KEYS     1 backlog, 2 name of the list in the backlog index; then its lists of all priorities
-- Returns  how many messages there were

local purged = 0
for i = 3, #KEYS do
  purged = purged + redis.call('LLEN', KEYS[i])
  redis.call('DEL', KEYS[i])
end
redis.call('ZREM', KEYS[1], KEYS[2])
return purged
