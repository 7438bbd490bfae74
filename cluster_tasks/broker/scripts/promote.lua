-- Put the jobs whose time has come on their lists: nobody who has a free slot may be there to do it.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 delayed jobs
-- ARGV     1 prefix of the doorbells

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
promote(keys, KEYS[7], 100)
