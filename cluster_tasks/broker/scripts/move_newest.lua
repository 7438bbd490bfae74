-- Move jobs from the back of a node's list behind those of other nodes' lists, in their order. Safe to repeat and to run
-- twice at once: a message that is not about where it was read is passed over, and so is one whose target may not be
-- given it.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits, 7 list that is too long,
--          8 counters
-- ARGV     1 prefix of the doorbells, 2 name of the list in the backlog index, 3 place of the newest of the messages,
--          counted from the back, 4 counter of what is moved; then five a message, the oldest first: list of the target
--          node, waiting list, request type, priority suffix, message
-- Returns  the list that each message went to which was moved

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
-- What was published since they were read lies behind them.
local first, count = tonumber(ARGV[3]), (#ARGV - 4) / 5
local at = {}
for i, message in ipairs(redis.call('LRANGE', KEYS[7], first, first + 2 * count + 100)) do
  at[message] = first + i - 1
end

local moving = {}
for i = 5, #ARGV, 5 do
  local index = at[ARGV[i + 4]]
  if index and may_get(keys, ARGV[i], ARGV[i]) then
    -- No message is empty. All are marked before one is taken out, so that no other changes its place meanwhile.
    redis.call('LSET', KEYS[7], index, '')
    at[ARGV[i + 4]] = nil
    moving[#moving + 1] = i
  end
end
if #moving == 0 then return {} end
redis.call('LREM', KEYS[7], #moving, '')
if redis.call('ZSCORE', keys.backlog, ARGV[2])
    and tonumber(redis.call('ZINCRBY', keys.backlog, -#moving, ARGV[2])) <= 0 then
  redis.call('ZREM', keys.backlog, ARGV[2])
end
local targets = {}
for n, i in ipairs(moving) do
  targets[n] = place(keys, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], 'LPUSH')
end
redis.call('HINCRBY', KEYS[8], ARGV[4], #moving)
return targets
