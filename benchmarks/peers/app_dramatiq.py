"""dramatiq, which acknowledges late: a worker that is gone for a minute has its messages given to others.

For speed: 64 messages fetched ahead (``dramatiq_queue_prefetch``), for they are short; hiredis.
"""

from __future__ import annotations

import os
import sys

import dramatiq
import job
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

broker = RedisBroker(url=os.environ[job.REDIS_URL])
if os.environ[job.RESULTS] == "1":
    broker.add_middleware(Results(backend=RedisBackend(url=os.environ[job.REDIS_URL]), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor
def noop() -> None:
    job.noop()


if __name__ == "__main__":
    for _ in range(int(sys.argv[1])):
        noop.send()
