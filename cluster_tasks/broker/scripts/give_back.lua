-- Move jobs out of the cluster's hands to queues that are not its own, for workers that know nothing of it. Safe to
-- repeat and to run twice at once: a message that is not where it was read is passed over.
--
-- KEYS     1 list or sorted set that holds the messages, 2 backlog
-- ARGV     1 name of the list in the backlog index ('' for the sorted set); then three a message: what it is there,
--          the queue that it goes to, what it is to be there
-- Returns  how many were moved

local moved = 0
for i = 2, #ARGV, 3 do
  local found
  if ARGV[1] == '' then
    found = redis.call('ZREM', KEYS[1], ARGV[i])
  else
    found = redis.call('LREM', KEYS[1], -1, ARGV[i])
  end
  if found == 1 then
    redis.call('LPUSH', ARGV[i + 1], ARGV[i + 2])
    moved = moved + 1
  end
end
if ARGV[1] ~= '' and redis.call('ZSCORE', KEYS[2], ARGV[1])
    and tonumber(redis.call('ZINCRBY', KEYS[2], -moved, ARGV[1])) <= 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return moved
