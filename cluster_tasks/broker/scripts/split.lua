-- Take a message of several jobs out of a hash of deliveries, and let each of them that has not ended, or gone on as its
-- own retry, go on as a message of its own: in front of the others, in their order. If processes died with the message,
-- each is charged with that and waits among the suspects. Safe to repeat.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 hash of deliveries, 8 tags of those not
--          started, 9 crashes of the message
-- ARGV     1 prefix of the doorbells, 2 tag, 3 record of the crash ('' charges nobody), 4 seconds that records live; then
--          eight a job, the last one first: marker that it has ended, what has followed it, its crashes, waiting list,
--          that of suspects, request type, priority suffix, message
-- Returns  how many went on, -1 the delivery was gone

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
if redis.call('HDEL', KEYS[7], ARGV[2]) == 0 then return -1 end
redis.call('SREM', KEYS[8], ARGV[2])
redis.call('DEL', KEYS[9])
local placed = 0
for i = 5, #ARGV, 8 do
  local marker, followed, crashes, waiting, suspects = unpack(ARGV, i, i + 4)
  local ended_by = redis.call('GET', marker)
  if ended_by then
    -- The marker was to live for longer than the delivery.
    local lives = string.match(ended_by, ' (%d+)$')
    if lives and lives ~= '0' then redis.call('EXPIRE', marker, lives) end
  elseif redis.call('EXISTS', followed) == 0 then
    if ARGV[3] ~= '' then
      redis.call('RPUSH', crashes, ARGV[3])
      redis.call('EXPIRE', crashes, ARGV[4])
      waiting = suspects
    end
    place(keys, '', waiting, ARGV[i + 5], ARGV[i + 6], ARGV[i + 7], 'RPUSH')
    placed = placed + 1
  end
end
return placed
