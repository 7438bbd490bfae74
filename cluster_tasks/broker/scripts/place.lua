-- Put messages on the lists of nodes or, where a node may not work, on the waiting lists of their types.
--
-- KEYS     1 epochs, 2 draining, 3 backlog, 4 idle, 5 serves, 6 limits
-- ARGV     1 prefix of the doorbells; then five a message: node list ('' for none), waiting list, request type,
--          priority suffix, message
-- Returns  the list that each message went to

local keys = {
  epochs = KEYS[1], draining = KEYS[2], backlog = KEYS[3], idle = KEYS[4], serves = KEYS[5], limits = KEYS[6],
  bells = ARGV[1],
}
local targets = {}
for i = 2, #ARGV, 5 do
  targets[#targets + 1] = place(keys, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], 'LPUSH')
end
return targets
