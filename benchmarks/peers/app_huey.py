"""huey, which takes a job from its list before it runs it: a job whose worker dies is lost. It has no late acks.

For speed: blocking reads (its default with Redis), no periodic tasks, no health checks; hiredis. ``store_none``, so
that the result of this job is one.
"""

from __future__ import annotations

import os
import sys

import job
from huey import RedisHuey

wanted = os.environ[job.RESULTS] == "1"
huey = RedisHuey("noop", url=os.environ[job.REDIS_URL], results=wanted, store_none=wanted)


# A job is found by the module of its function, which is not this one where it runs as a script.
noop = huey.task()(job.noop)

if __name__ == "__main__":
    for _ in range(int(sys.argv[1])):
        noop()
