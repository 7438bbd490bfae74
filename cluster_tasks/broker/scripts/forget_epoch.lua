-- Forget a fenced epoch whose remains are moved, and tell so. Safe to repeat and to run twice at once: who is first
-- tells.
--
-- KEYS     1 fenced epochs, 2 events, 3 epochs that were begun
-- ARGV     1 the epoch, as both sets of them name it, 2 events to keep; then fields and values of the event (none: nothing is told)
-- Returns  1 forgotten, 0 it was forgotten before

redis.call('SREM', KEYS[3], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
if ARGV[3] then redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3)) end
return 1
