-- Shared by the scripts that handle jobs whose time has not come; prepended to them, behind placing.lua.
--
-- A member of the sorted set is what place() needs, a line each, and then the message.

local function now_s()
  local now = redis.call('TIME')
  return string.format('%d.%06d', now[1], now[2])
end

-- Place up to `most` jobs whose time has come. What is no such member goes to the list `own` as it is: the node that
-- fetches it there sets it aside. Without `own` it stays.
local function promote(keys, delayed, most, own)
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', delayed, '-inf', now_s(), 'LIMIT', 0, most)) do
    local queue, waiting, kind, suffix, message = string.match(entry, '^(.-)\n(.-)\n(.-)\n(.-)\n(.*)$')
    if message or own then redis.call('ZREM', delayed, entry) end
    if message then
      place(keys, queue, waiting, kind, suffix, message, 'LPUSH')
    elseif own then
      place(keys, own, own, '', '', entry, 'LPUSH')
    end
  end
end

-- Keep a job until its time has come. A node that waits at its doorbell for longer than that is rung, to wait anew.
local function delay(keys, delayed, due, longest_wait, entry)
  redis.call('ZADD', delayed, due, table.concat(entry, '\n'))
  if tonumber(due) - tonumber(now_s()) < tonumber(longest_wait) then
    local idle = idle_node(keys, entry[3], '')
    if idle then ring(keys, idle) end
  end
end

-- The earlier of two answers of next_due_ms.
local function sooner(a, b)
  if a == '' then return b end
  return b == '' and a or math.min(a, b)
end

-- Milliseconds until the next job is due, '' if none is delayed.
local function next_due_ms(delayed)
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if not first[2] then return '' end
  return math.max(math.ceil((tonumber(first[2]) - tonumber(now_s())) * 1000), 0)
end
