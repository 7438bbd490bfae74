"""A process whose threads all ask for one missing key: ``python -m tests.contract.askers URL THREADS SECONDS``."""

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


def main(url: str, threads: int, seconds: float) -> None:
    """Wait for the sign, ask, and write down who computed and who got what."""
    notes, clock = redis.Redis.from_url(url), SystemClock()
    shared = share(CacheConnection(url, clock), Keys(), clock)
    cache = TieredCache(Memory(clock, Counters()), RedisCache(shared, "test"))

    def compute() -> bytes:
        notes.rpush(COMPUTED, os.getpid())
        time.sleep(seconds)
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
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
