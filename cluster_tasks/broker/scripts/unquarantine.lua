-- Place a job anew that was kept in quarantine, and forget it there.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 quarantine, 8 when each came
-- ARGV     1 prefix of the doorbells, 2 job id, 3 node list ('' for none), 4 waiting list, 5 request type, 6 priority
--          suffix, 7 message
-- Returns  1 placed, 0 it is not in quarantine any more

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
if redis.call('HDEL', KEYS[7], ARGV[2]) == 0 then return 0 end
redis.call('ZREM', KEYS[8], ARGV[2])
place(keys, ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], 'LPUSH')
return 1
