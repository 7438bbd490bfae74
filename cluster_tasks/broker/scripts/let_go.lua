-- Let go of deliveries that are done. Safe to repeat.
--
-- KEYS     1 hash of deliveries
-- ARGV     three a delivery: tag, marker that its job has ended, what was kept of that end
-- Returns  how many stood

local stood = 0
for i = 1, #ARGV, 3 do
  if let_go(KEYS[1], ARGV[i], ARGV[i + 1], ARGV[i + 2]) then stood = stood + 1 end
end
return stood
