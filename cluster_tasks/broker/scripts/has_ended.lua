-- Tell whether a job has come to its end.
--
-- KEYS     1 marker that the job has ended
-- Returns  1 it has, 0 it has not, or that is so long ago that nobody remembers it

return redis.call('EXISTS', KEYS[1])
