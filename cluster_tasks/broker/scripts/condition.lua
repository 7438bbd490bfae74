-- Tell that something has begun that lasts, or that it is over: once, however many observers see it.
--
-- KEYS     1 set while it lasts, 2 events
-- ARGV     1 seconds after which it is forgotten unless somebody sees it still, '' for over, 2 events to keep; then fields
--          and values of the event
-- Returns  1 told, 0 another was first

if ARGV[1] == '' then
  if redis.call('DEL', KEYS[1]) == 0 then return 0 end
elseif not redis.call('SET', KEYS[1], 1, 'NX', 'EX', ARGV[1]) then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  return 0
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
return 1
