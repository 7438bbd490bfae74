"""A process whose threads all ask for one missing key: ``python -m tests.contract.askers URL THREADS FIRST_S SECONDS``.

Who computes it first takes FIRST_S seconds for that, any other SECONDS.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import redis

from cluster_tasks.cache import Memory, RedisCache, TieredCache, share
from cluster_tasks.cache.connection import CacheConnection
from cluster_tasks.cache.counters import Counters
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys

ASKED, COMPUTED, GO, GOT = "test:asked", "test:computed", "test:go", "test:got"


def main(url: str, threads: int, first_s: float, seconds: float) -> None:
    """Wait for the sign, ask, and write down who computed and who got what."""
    notes, clock = redis.Redis.from_url(url), SystemClock()
    shared = share(CacheConnection(url, clock, timeout_s=5.0), Keys(), clock)
    cache = TieredCache(Memory(clock, Counters()), RedisCache(shared, "test"))

    def compute() -> bytes:
        time.sleep(first_s if notes.rpush(COMPUTED, os.getpid()) == 1 else seconds)
        return b"value"

    def ask() -> None:
        notes.rpush(GOT, cache.get_or_compute("key", compute) or b"")

    notes.incr(ASKED)
    while not notes.exists(GO):
        time.sleep(0.005)
    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    shared.coherence.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
