"""taskiq on Redis streams, its broker that acknowledges: when the result is saved, or the job done.

For speed: uvloop, 100 messages in each read, 100 jobs at once, none fetched ahead of them; coroutines, which need no
thread; hiredis.
"""

from __future__ import annotations

import asyncio
import os
import sys

import job
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ[job.REDIS_URL]
# From the start of the stream, and not from the messages that come when the group is there.
broker = RedisStreamBroker(URL, consumer_id="0", xread_count=100)
if os.environ[job.RESULTS] == "1":
    broker = broker.with_result_backend(RedisAsyncResultBackend(URL, result_ex_time=3600))


@broker.task(task_name="noop")
async def noop() -> None:
    job.noop()


async def publish(count: int) -> None:
    await broker.startup()
    for start in range(0, count, 100):
        await asyncio.gather(*(noop.kiq() for _ in range(min(100, count - start))))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(publish(int(sys.argv[1])))
