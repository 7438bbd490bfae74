-- Shared by the scripts that write results; prepended to them, behind a line that declares `jobs_db` and `results_db`,
-- the numbers of the databases of this Redis where jobs and results live.

-- The connection is one for results, and all but them is with the jobs.
if results_db ~= jobs_db then redis.call('SELECT', jobs_db) end

-- Write a result, which lives `ttl` seconds (0: for ever), and tell who waits for it.
local function store(key, value, ttl)
  if results_db ~= jobs_db then redis.call('SELECT', results_db) end
  if tonumber(ttl) > 0 then redis.call('SET', key, value, 'EX', ttl) else redis.call('SET', key, value) end
  redis.call('PUBLISH', key, value)
  if results_db ~= jobs_db then redis.call('SELECT', jobs_db) end
end
