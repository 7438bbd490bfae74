-- Move held messages out of a hash of deliveries, to the front of the lists. Those that had started may be charged with
-- a crash; a job that was ever charged waits among the suspects, unless it goes to the list of which only one node takes.
-- Safe to repeat and to run twice at once: a delivery that is gone is passed over.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 hash of deliveries, 8 tags of those not
--          started, 9 counters
-- ARGV     1 prefix of the doorbells, 2 record of the crash ('' charges nobody), 3 seconds that records live, 4 counter
--          of what is moved; then eight a message: tag, node list ('' for none), waiting list, that of suspects, list of the job's crashes,
--          request type, priority suffix, message
-- Returns  how many were moved

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
local moved, charged = 0, 0
for i = 5, #ARGV, 8 do
  local tag, queue, waiting, suspects, crashes = unpack(ARGV, i, i + 4)
  if redis.call('HDEL', KEYS[7], tag) == 1 then
    if redis.call('SREM', KEYS[8], tag) == 0 and ARGV[2] ~= '' then
      redis.call('RPUSH', crashes, ARGV[2])
      redis.call('EXPIRE', crashes, ARGV[3])
      charged = charged + 1
    end
    if redis.call('EXISTS', crashes) == 1 then
      waiting = suspects
      if not string.match(queue, '%.bound$') then queue = '' end
    end
    place(keys, queue, waiting, ARGV[i + 5], ARGV[i + 6], ARGV[i + 7], 'RPUSH')
    moved = moved + 1
  end
end
if charged > 0 then redis.call('HINCRBY', KEYS[9], 'crash_deliveries', charged) end
if moved > 0 then redis.call('HINCRBY', KEYS[9], ARGV[4], moved) end
return moved
