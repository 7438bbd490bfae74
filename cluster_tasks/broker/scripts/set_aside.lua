-- Take a message that cannot be decoded out of a hash of deliveries or a list, and keep it where people can look at
-- it. Safe to repeat and to run twice at once.
--
-- KEYS     1 undecodable messages, 2 hash or list that holds the message, 3 backlog
-- ARGV     1 message, 2 tag of the delivery ('' for a list), 3 name of the list in the backlog index,
--          4 how many messages are kept, of which the oldest go, 5 marker that its job has ended, 6 what was kept of that
--          end (both for a delivery)
-- Returns  1 set aside, 0 it was not there any more

if ARGV[2] ~= '' then
  if not let_go(KEYS[2], ARGV[2], ARGV[5], ARGV[6]) then return 0 end
else
  if redis.call('LREM', KEYS[2], -1, ARGV[1]) == 0 then return 0 end
  if redis.call('ZSCORE', KEYS[3], ARGV[3]) and tonumber(redis.call('ZINCRBY', KEYS[3], -1, ARGV[3])) <= 0 then
    redis.call('ZREM', KEYS[3], ARGV[3])
  end
end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, ARGV[4] - 1)
return 1
