-- Read what is kept of the end of a job for as long as its delivery stands.
--
-- KEYS     1 what was kept
-- Returns  the result, or nothing

return redis.call('GET', KEYS[1])
