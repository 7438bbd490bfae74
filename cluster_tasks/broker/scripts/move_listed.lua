-- Move the head of a list, one message after the other in their order. Safe to repeat and to run twice at once: it
-- stops at the first message that is not the head any more.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 list to empty,
--          8 counters
-- ARGV     1 prefix of the doorbells, 2 name of the list in the backlog index, 3 counter of what is moved; then five a
--          message: node list ('' for none), waiting list, request type, priority suffix, message
-- Returns  how many were moved

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
local moved = 0
for i = 4, #ARGV, 5 do
  if redis.call('LINDEX', KEYS[7], -1) ~= ARGV[i + 4] then break end
  redis.call('RPOP', KEYS[7])
  place(keys, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], 'LPUSH')
  moved = moved + 1
end
if moved > 0 and redis.call('ZSCORE', KEYS[3], ARGV[2])
    and tonumber(redis.call('ZINCRBY', KEYS[3], -moved, ARGV[2])) <= 0 then
  redis.call('ZREM', KEYS[3], ARGV[2])
end
if moved > 0 then redis.call('HINCRBY', KEYS[8], ARGV[3], moved) end
return moved
