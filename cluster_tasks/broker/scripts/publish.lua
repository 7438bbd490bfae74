-- Place a job, now or when its time has come, unless this publish or a later one of the same producer was done before.
-- It may be hedged: then the message is kept for a second node.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 delayed jobs, 8 number of the producer's last
--          publish; if it is hedged 9 hedges of the second node by due time, 10 their messages
-- ARGV     1 prefix of the doorbells, 2 number of this publish, 3 seconds that it is remembered, 4 seconds since 1970
--          ('' for now), 5 longest wait at a doorbell in seconds, 6 node list ('' for none), 7 waiting list, 8 request
--          type, 9 priority suffix, 10 message; if it is hedged 11 list of the second node, 12 seconds until then,
--          13 id of the job
-- Returns  1 placed, 0 it had been before

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
if tonumber(redis.call('GET', KEYS[8]) or 0) >= tonumber(ARGV[2]) then return 0 end
if ARGV[4] == '' then
  place(keys, ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10], 'LPUSH')
else
  delay(keys, KEYS[7], ARGV[4], ARGV[5], { unpack(ARGV, 6, 10) })
end
if ARGV[11] then keep_hedge(keys, KEYS[9], KEYS[10], ARGV[11], ARGV[13], ARGV[12], ARGV[5], ARGV[10]) end
redis.call('SET', KEYS[8], ARGV[2], 'EX', ARGV[3])
return 1
