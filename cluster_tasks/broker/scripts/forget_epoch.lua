-- Forget a fenced epoch whose remains are moved, and what was noted of them, and tell so. Safe to repeat and to run
-- twice at once: who is first tells.
--
-- KEYS     1 fenced epochs, 2 events, 3 epochs that were begun, 4 tags of its deliveries that were not started
-- ARGV     1 the epoch, as both sets of them name it, 2 events to keep; then fields and values of the event (none: nothing is told)
-- Returns  1 forgotten, 0 it was forgotten before

redis.call('SREM', KEYS[3], ARGV[1])
redis.call('DEL', KEYS[4])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[3] then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3)) end
return 1
