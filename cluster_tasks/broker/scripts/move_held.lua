-- Move held messages out of a hash of deliveries, to the front of the lists. Safe to repeat and to run twice at once:
-- a delivery that is gone is passed over.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 hash of deliveries
-- ARGV     1 prefix of the doorbells; then six a message: tag, node list ('' for none), waiting list, request type,
--          priority suffix, message
-- Returns  how many were moved

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], bells = ARGV[1],
}
local moved = 0
for i = 2, #ARGV, 6 do
  if redis.call('HDEL', KEYS[6], ARGV[i]) == 1 then
    place(keys, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], 'RPUSH')
    moved = moved + 1
  end
end
return moved
