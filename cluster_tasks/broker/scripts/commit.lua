-- End a job: write its result and remove its delivery, provided that the delivery still stands and that nothing has
-- ended the job before. Repeating it for the same delivery changes nothing.
--
-- KEYS     1 hash of deliveries, 2 marker that the job has ended, 3 result, 4 counters, 5 crashes of the job,
--          6 what has followed it already, 7 what is kept of the end
-- ARGV     1 tag of the delivery, 2 result ('' if nobody wants it), 3 seconds that result and marker live (0: for
--          ever), 4 '' to remove the delivery; else it is left in place, because something follows the result, and
--          this is kept of the end, 5 other marker that stands for this very end ('' for none), 6 seconds that is
--          remembered what else follows, 7 how it ends
-- Returns  1 committed, 0 refused: the delivery is gone, -1 refused: the job had ended

-- A child may succeed while its parent ends the job for its time limit: of two ends by one delivery the first counts.
local own = ARGV[1] .. ' ' .. ARGV[7] .. ' ' .. ARGV[3]
local ended_by = redis.call('GET', KEYS[2])
local stands = redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1
if not ended_by and stands then
  redis.call('SET', KEYS[2], own)
  if ARGV[4] ~= '' then
    -- All nodes may be away for longer than a result lives: as long as the delivery stands, so does its end.
    redis.call('SET', KEYS[7], ARGV[4])
  elseif tonumber(ARGV[3]) > 0 then
    redis.call('EXPIRE', KEYS[2], ARGV[3])
  end
  if ARGV[2] ~= '' then store(KEYS[3], ARGV[2], ARGV[3]) end
  redis.call('DEL', KEYS[5])
elseif ended_by ~= own and (not stands or ended_by ~= ARGV[5]) then
  redis.call('HINCRBY', KEYS[4], 'stale_commits', 1)
  return stands and -1 or 0
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('DEL', KEYS[6])
else
  redis.call('EXPIRE', KEYS[6], ARGV[6])
end
return 1
