-- Keep a job until its time has come.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 delayed jobs
-- ARGV     1 prefix of the doorbells, 2 seconds since 1970, 3 longest wait at a doorbell in seconds, 4 node list (''
--          for none), 5 waiting list, 6 request type, 7 priority suffix, 8 message
-- Returns  nothing

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
delay(keys, KEYS[7], ARGV[2], ARGV[3], { unpack(ARGV, 4, 8) })
