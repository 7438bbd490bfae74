-- End jobs that one message holds: write their results, provided that its delivery still stands, each unless something
-- has ended it before. With the last of them the delivery is removed. Repeating it for the same delivery changes nothing.
--
-- KEYS     1 hash of deliveries, 2 counters, 3 marker that the message has ended
-- ARGV     1 tag of the delivery, 2 seconds that its marker lives if these ends are the last ('' if not), 3 seconds that
--          the markers of jobs live at least while it stands, 4 number of jobs that it ended before; then of each of these
--          the marker and the seconds it lives; then eight a job: marker that it has ended, result, crashes, what has
--          followed it already, the result to be written ('' if nobody wants it), seconds that result and marker live
--          (0: for ever), other marker that stands for this very end ('' for none), how it ends
-- Returns  one number a job: 1 committed, 0 refused: the delivery is gone, -1 refused: the job had ended

local tag, last = ARGV[1], ARGV[2] ~= ''
local stands = redis.call('HEXISTS', KEYS[1], tag) == 1
local first, reply = 5 + 2 * tonumber(ARGV[4]), {}

local function live(key, lives)
  if lives ~= '0' then redis.call('EXPIRE', key, lives) end
end

for i = first, #ARGV, 8 do
  local marker, result, crashes, followed, written, lives, same, how = unpack(ARGV, i, i + 7)
  local own = tag .. ' ' .. how .. ' ' .. lives
  local ended_by = redis.call('GET', marker)
  if not ended_by and stands then
    redis.call('SET', marker, own)
    if last then live(marker, lives)
    elseif lives ~= '0' then redis.call('EXPIRE', marker, math.max(tonumber(lives), tonumber(ARGV[3]))) end
    if written ~= '' then store(result, written, lives) end
    redis.call('DEL', crashes, followed)
    reply[#reply + 1] = 1
  elseif ended_by == own or (stands and ended_by and ended_by == same) then
    reply[#reply + 1] = 1
  else
    redis.call('HINCRBY', KEYS[2], 'stale_commits', 1)
    reply[#reply + 1] = stands and -1 or 0
  end
end
if stands and last then
  for i = 5, first - 1, 2 do live(ARGV[i], ARGV[i + 1]) end
  redis.call('SET', KEYS[3], tag .. ' MEMBERS ' .. ARGV[2], 'EX', ARGV[2])
  redis.call('HDEL', KEYS[1], tag)
end
return reply
