-- Stop or resume placing jobs on a node.
--
-- KEYS     1 epochs, 2 draining
-- ARGV     1 list of the node, 2 epoch that must stand ('' for any), 3 '1' to stop, '0' to resume
-- Returns  1 done, 0 no such epoch stands

local standing = redis.call('HGET', KEYS[1], ARGV[1])
if not standing or (ARGV[2] ~= '' and standing ~= ARGV[2]) then return 0 end
redis.call(ARGV[3] == '1' and 'SADD' or 'SREM', KEYS[2], ARGV[1])
return 1
