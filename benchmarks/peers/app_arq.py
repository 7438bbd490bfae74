"""arq, which forgets a job only when it has ended: a worker that died has its jobs run again when their time is over.

For speed: many jobs at once, a larger share of the queue in each look, and a look as soon as the last is done with, not
twice a second; as little in the log as the others write. A result that is not wanted is kept for 0 seconds. hiredis
comes with it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import job
from arq import create_pool
from arq.connections import RedisSettings

settings = RedisSettings.from_dsn(os.environ[job.REDIS_URL])


async def noop(context: dict[str, Any]) -> None:
    job.noop()


QUIET = {"version": 1, "disable_existing_loggers": False, "loggers": {"arq": {"level": "WARNING"}}}


class WorkerSettings:
    functions = (noop,)
    redis_settings = settings
    max_jobs = 100
    queue_read_limit = 1000
    poll_delay = 0.01
    keep_result = 3600 if os.environ[job.RESULTS] == "1" else 0


async def publish(count: int) -> None:
    pool = await create_pool(settings)
    for start in range(0, count, 100):
        await asyncio.gather(*(pool.enqueue_job("noop") for _ in range(min(100, count - start))))
    await pool.aclose()


if __name__ == "__main__":
    asyncio.run(publish(int(sys.argv[1])))
