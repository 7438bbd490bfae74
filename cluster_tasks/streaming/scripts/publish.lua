-- Add an entry to the stream of a job, provided that the delivery stands which it comes from, and that no later one has
-- written. Repeating it changes nothing.
--
-- KEYS     1 hash of deliveries, 2 stream, 3 what the reader has told
-- ARGV     1 tag of the delivery, 2 its fencing token, 3 number of the entry in this delivery, 4 seconds that the stream
--          lives, 5 the most entries that are kept, then fields and values of the entry; without any nothing is added
-- Returns  0 written, or nothing to write; 1 refused: a later delivery has written; 2 refused: the delivery was taken
--          away. Then how far the reader is, and whether he wants no more, as he has told it.

local read, gone = unpack(redis.call('HMGET', KEYS[3], 'read', 'gone'))
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return {2, read, gone} end
if not ARGV[6] then return {0, read, gone} end

local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local token, number = 0, 0
if last then token, number = last[1]:match('(%d+)-(%d+)') end
if tonumber(token) > tonumber(ARGV[2]) then return {1, read, gone} end
if tonumber(token) < tonumber(ARGV[2]) or tonumber(number) < tonumber(ARGV[3]) then
  redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[5], ARGV[2] .. '-' .. ARGV[3], unpack(ARGV, 6))
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
return {0, read, gone}
