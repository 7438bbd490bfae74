-- Shared by the scripts that keep and give hedges; prepended to them, behind placing.lua and delaying.lua.
--
-- The hedges of a node are a sorted set of job ids by the second since 1970 when they are due, and a hash of messages.
-- Both expire a minute after the last one was kept: a job that is purged takes back nothing.

-- Keep a message for a second node, if it may work. If it waits at its doorbell for longer than that, it is told to wait
-- anew, and not to fetch: it would take the job from the list of the first one.
local function keep_hedge(keys, due, messages, node, job, after_s, longest_wait, message)
  if not may_get(keys, node, node) then return end
  redis.call('ZADD', due, string.format('%.6f', now_s() + after_s), job)
  redis.call('HSET', messages, job, message)
  redis.call('EXPIRE', due, 60)
  redis.call('EXPIRE', messages, 60)
  if tonumber(after_s) < tonumber(longest_wait) and redis.call('ZSCORE', keys.idle, node) then
    redis.call('LPUSH', keys.bells .. node, 'within ' .. after_s)
    redis.call('EXPIRE', keys.bells .. node, 60)
  end
end

-- Let the node whose list is `first` hedge what was taken from it by the very node, with the list `own`, that was to: one
-- that is late with a job is no help with it. It was rung for the job, so it will look.
local function hand_over_hedge(keys, due, messages, own, first, message)
  local kept, id = redis.call('HGETALL', messages), string.match(due, ':hedges:(.+)$')
  local first_id = string.sub(first, #own - #id + 1)
  for i = 1, #kept, 2 do
    local at = kept[i + 1] == message and redis.call('ZSCORE', due, kept[i])
    if at then
      redis.call('ZREM', due, kept[i])
      redis.call('HDEL', messages, kept[i])
      local its_due, its_messages = string.sub(due, 1, -#id - 1) .. first_id, string.sub(messages, 1, -#id - 1) .. first_id
      keep_hedge(keys, its_due, its_messages, first, kept[i], at - now_s(), 0, message)
    end
  end
end

-- Return up to `most` messages that are due, and forget them here. Jobs that the node holds in the hash `unacked` are not
-- among them: they were moved to its list from that of the first one.
local function due_hedges(due, messages, most, unacked)
  local jobs, found, held = redis.call('ZRANGEBYSCORE', due, '-inf', now_s(), 'LIMIT', 0, most), {}, {}
  if #jobs == 0 then return found end
  for _, message in ipairs(redis.call('HVALS', unacked)) do held[message] = true end
  for _, job in ipairs(jobs) do
    local message = redis.call('HGET', messages, job)
    if message and not held[message] then found[#found + 1] = message end
    redis.call('ZREM', due, job)
    redis.call('HDEL', messages, job)
  end
  return found
end
