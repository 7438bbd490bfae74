-- Move jobs out of the cluster's hands to queues that are not its own, for workers that know nothing of it. Safe to
-- repeat and to run twice at once: a message that is not where it was read is passed over.
--
-- KEYS     1 list or sorted set that holds the messages, 2 backlog
-- ARGV     1 name of the list in the backlog index ('' for the sorted set); then for each message: what it is there, the
--          queue that it goes to, how many messages it is to be there, and these
-- Returns  how many messages they are there

local moved, given, i = 0, 0, 2
while i <= #ARGV do
  local found, last
  if ARGV[1] == '' then
    found = redis.call('ZREM', KEYS[1], ARGV[i])
  else
    found = redis.call('LREM', KEYS[1], -1, ARGV[i])
  end
  last = i + 2 + tonumber(ARGV[i + 2])
  if found == 1 then
    for message = i + 3, last do redis.call('LPUSH', ARGV[i + 1], ARGV[message]) end
    moved, given = moved + 1, given + tonumber(ARGV[i + 2])
  end
  i = last + 1
end
if ARGV[1] ~= '' and redis.call('ZSCORE', KEYS[2], ARGV[1])
    and tonumber(redis.call('ZINCRBY', KEYS[2], -moved, ARGV[1])) <= 0 then
  redis.call('ZREM', KEYS[2], ARGV[1])
end
return given
