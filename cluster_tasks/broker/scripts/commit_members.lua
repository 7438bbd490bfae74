-- End jobs that one message holds: write their results, provided that its delivery still stands, each unless something
-- has ended it before. With the last of them the delivery is removed. Repeating it for the same delivery changes nothing.
--
-- KEYS     1 hash of deliveries, 2 counters, 3 marker that the message has ended
-- ARGV     1 tag of the delivery, 2 seconds that its marker lives if these ends are the last ('' if not), 3 seconds that
--          the markers of jobs live at least while it stands, 4 number of jobs that it ended before; what the keys of a
--          job begin with, before its id: 5 marker that it has ended, 6 result, 7 crashes, 8 what has followed it
--          already; then of each of those jobs the id and the seconds that its marker lives; then five a job: id, the
--          result to be written ('' if nobody wants it), seconds that result and marker live (0: for ever), other
--          marker that stands for this very end ('' for none), how it ends
-- Returns  one number a job: 1 committed, 0 refused: the delivery is gone, -1 refused: the job had ended

local tag, last = ARGV[1], ARGV[2] ~= ''
local stands = redis.call('HEXISTS', KEYS[1], tag) == 1
local terminal, result, crashes, followed = unpack(ARGV, 5, 8)
local first, reply = 9 + 2 * tonumber(ARGV[4]), {}

local function mark(marker, own, lives)
  if lives == '0' then redis.call('SET', marker, own)
  elseif last then redis.call('SET', marker, own, 'EX', lives)
  else redis.call('SET', marker, own, 'EX', math.max(tonumber(lives), tonumber(ARGV[3]))) end
end

for i = first, #ARGV, 5 do
  local id, written, lives, same, how = unpack(ARGV, i, i + 4)
  local marker, own = terminal .. id, tag .. ' ' .. how .. ' ' .. lives
  local ended_by = redis.call('GET', marker)
  if not ended_by and stands then
    mark(marker, own, lives)
    if written ~= '' then store(result .. id, written, lives) end
    redis.call('DEL', crashes .. id, followed .. id)
    reply[#reply + 1] = 1
  elseif ended_by == own or (stands and ended_by == same) then
    reply[#reply + 1] = 1
  else
    redis.call('HINCRBY', KEYS[2], 'stale_commits', 1)
    reply[#reply + 1] = stands and -1 or 0
  end
end
if stands and last then
  for i = 9, first - 1, 2 do
    if ARGV[i + 1] ~= '0' then redis.call('EXPIRE', terminal .. ARGV[i], ARGV[i + 1]) end
  end
  redis.call('SET', KEYS[3], tag .. ' MEMBERS ' .. ARGV[2], 'EX', ARGV[2])
  redis.call('HDEL', KEYS[1], tag)
end
return reply
