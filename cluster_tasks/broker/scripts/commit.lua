-- End a job: write its result and remove its delivery, provided that the delivery still stands and that nothing has
-- ended the job before. Repeating it for the same delivery changes nothing. A job that is hedged takes back its hedge;
-- if that was given already, to come second is what one of the two must.
--
-- KEYS     1 hash of deliveries, 2 marker that the job has ended, 3 result, 4 counters, 5 crashes of the job,
--          6 what has followed it already, 7 what is kept of the end; if it is hedged 8 hedges of the second node by due
--          time, 9 their messages, 10 durations of such jobs
-- ARGV     1 tag of the delivery, 2 result ('' if nobody wants it), 3 seconds that result and marker live (0: for
--          ever), 4 '' to remove the delivery; else it is left in place, because something follows the result, and
--          this is kept of the end, 5 other marker that stands for this very end ('' for none), 6 seconds that is
--          remembered what else follows, 7 how it ends; if it is hedged 8 id of the job, 9 seconds after which it is,
--          10 seconds that the marker lives if the hedge was given, 11 durations to keep, 12 seconds that they are kept
-- Returns  1 committed, 0 refused: the delivery is gone, -1 refused: the job had ended

-- A child may succeed while its parent ends the job for its time limit: of two ends by one delivery the first counts.
local own = ARGV[1] .. ' ' .. ARGV[7] .. ' '
local ended_by = redis.call('GET', KEYS[2])
local stands = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1

-- Take back the hedge and note how long the job took. Returns how long the marker is to live.
local function take_back_hedge()
  local now, due, took = redis.call('TIME'), redis.call('ZSCORE', KEYS[8], ARGV[8]), nil
  now = now[1] + now[2] / 1000000
  if due then
    redis.call('ZREM', KEYS[8], ARGV[8])
    redis.call('HDEL', KEYS[9], ARGV[8])
    took = now - due + ARGV[9]
  else
    -- Since the fetch, as the tag says. A hedge that came first has helped, and is no reason to send the next one later.
    took = math.max(ARGV[9], now - string.match(ARGV[1], '(%d+)$') / 1000000)
  end
  redis.call('LPUSH', KEYS[10], string.format('%.6f', took))
  redis.call('LTRIM', KEYS[10], 0, ARGV[11] - 1)
  redis.call('EXPIRE', KEYS[10], ARGV[12])
  if due or ARGV[3] == '0' then return ARGV[3] end
  return tostring(math.max(ARGV[3], ARGV[10]))
end

if not ended_by and stands then
  local lives = ARGV[8] and take_back_hedge() or ARGV[3]
  redis.call('SET', KEYS[2], own .. lives)
  if ARGV[4] ~= '' then
    -- All nodes may be away for longer than a result lives: as long as the delivery stands, so does its end.
    redis.call('SET', KEYS[7], ARGV[4])
  elseif tonumber(lives) > 0 then
    redis.call('EXPIRE', KEYS[2], lives)
  end
  if ARGV[2] ~= '' then store(KEYS[3], ARGV[2], ARGV[3]) end
  redis.call('DEL', KEYS[5])
elseif string.sub(ended_by or '', 1, #own) ~= own and (not stands or ended_by ~= ARGV[5]) then
  if not stands or not ARGV[8] then redis.call('HINCRBY', KEYS[4], 'stale_commits', 1) end
  return stands and -1 or 0
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('DEL', KEYS[6])
else
  redis.call('EXPIRE', KEYS[6], ARGV[6])
end
return 1
