-- Place a job that follows another one, now or when its time has come: once, and only while the delivery of the other
-- one stands.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 delayed jobs, 8 hash of deliveries of the node
--          that ran the other one, 9 what has followed it, 10 marker that this job has ended, 11 counters
-- ARGV     1 prefix of the doorbells, 2 tag of the delivery, 3 attempt at this job, 4 seconds that it is remembered,
--          5 seconds since 1970 ('' for now), 6 longest wait at a doorbell in seconds, 7 node list ('' for none),
--          8 waiting list, 9 request type, 10 priority suffix, 11 message
-- Returns  1 placed, 0 it had followed before, -1 the delivery was taken away

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
if redis.call('HEXISTS', KEYS[8], ARGV[2]) == 0 then
  redis.call('HINCRBY', KEYS[11], 'stale_commits', 1)
  return -1
end
if redis.call('EXISTS', KEYS[10]) == 1 or redis.call('SADD', KEYS[9], ARGV[3]) == 0 then return 0 end
redis.call('EXPIRE', KEYS[9], ARGV[4])
if ARGV[5] == '' then
  place(keys, ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11], 'LPUSH')
else
  delay(keys, KEYS[7], ARGV[5], ARGV[6], { unpack(ARGV, 7, 11) })
end
return 1
