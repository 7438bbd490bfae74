-- Shared by the scripts that let go of deliveries which are done; prepended to them.

-- Let go of a delivery. If an end of its job was to stand for as long as the delivery did, its marker lives from now on
-- for as long as it says itself, and what was kept of the end goes. Both names are '' if the message names no job.
-- Returns whether the delivery stood.
local function let_go(unacked, tag, marker, kept)
  if redis.call('HDEL', unacked, tag) == 0 then return false end
  if marker ~= '' and redis.call('TTL', marker) == -1 then
    local lives = string.match(redis.call('GET', marker), ' (%d+)$')
    if lives and lives ~= '0' then redis.call('EXPIRE', marker, lives) end
    redis.call('DEL', kept)
  end
  return true
end
