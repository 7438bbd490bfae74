"""saq, with two attempts: then a sweep every minute runs a job again whose worker died, when its time-out is over.

For speed: 100 jobs at once, and as many operations of the queue; hiredis. A result that is not wanted has the ``ttl``
-1.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import job
from saq import Queue

queue = Queue.from_url(os.environ[job.REDIS_URL], max_concurrent_ops=100)


async def noop(context: dict[str, Any]) -> None:
    job.noop()


settings = {"queue": queue, "functions": [noop], "concurrency": 100}


async def publish(count: int) -> None:
    await queue.connect()
    lives_s = 3600 if os.environ[job.RESULTS] == "1" else -1
    for start in range(0, count, 100):
        some = min(100, count - start)
        await asyncio.gather(*(queue.enqueue("noop", ttl=lives_s, retries=2) for _ in range(some)))
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(publish(int(sys.argv[1])))
