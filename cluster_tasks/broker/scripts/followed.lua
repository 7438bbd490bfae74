-- Read what has followed a job or a chord.
--
-- KEYS     1 set of it
-- Returns  a list, each entry the id of a job and which attempt at it

return redis.call('SMEMBERS', KEYS[1])
