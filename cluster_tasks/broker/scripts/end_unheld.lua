-- End a job that no other node holds, as a revocation does, provided that nothing has ended it before. Who holds it may
-- run it, and knows better.
--
-- KEYS     1 marker that the job has ended, 2 result, 3 epochs
-- ARGV     1 what the marker says, 2 result, 3 seconds that result and marker live (0: for ever), 4 prefix of the lists of
--          nodes, 5 prefix of the hashes of deliveries, 6 that of this node ('' for none); then how a message names its
--          job, in all spellings
-- Returns  1 ended, 0 it had ended, -1 another node holds it, or may: no more than 2 MiB of messages are looked at. Then
--          the job ends when a node takes it.

if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local left, epochs = 2097152, redis.call('HGETALL', KEYS[3])
for i = 1, #epochs, 2 do
  local unacked = ARGV[5] .. string.sub(epochs[i], #ARGV[4] + 1) .. '/' .. epochs[i + 1]
  for _, tag in ipairs(unacked ~= ARGV[6] and redis.call('HKEYS', unacked) or {}) do
    -- Redis must not stand still for long messages or thousands of nodes.
    left = left - redis.call('HSTRLEN', unacked, tag)
    if left < 0 then return -1 end
    local message = redis.call('HGET', unacked, tag)
    for spelling = 7, #ARGV do
      if string.find(message, ARGV[spelling], 1, true) then return -1 end
    end
  end
end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(ARGV[3]) > 0 then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
store(KEYS[2], ARGV[2], ARGV[3])
return 1
