"""What a cache costs, beside cashews and dogpile.cache on one Redis: ``python -m benchmarks.cache [--json]``.

Install the others with ``pip install '.[benchmarks]'``. All use the same server, started for this run, and values of
6 KiB, as an embedding of 1,536 numbers takes. Medians are in microseconds, taken in turns. Mark: a hit in the process
under 20 microseconds. The stampede is 64 threads (cashews: tasks of one loop) that miss one key which takes 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from cashews import Cache as Cashews
from dogpile.cache import make_region

from cluster_tasks.cache import Memory, RedisCache, TieredCache, share
from cluster_tasks.cache.connection import CacheConnection
from cluster_tasks.cache.counters import Counters
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys
from workers.redis_server import RedisServer

VALUE = b"v" * 6144
MANY = [f"many{number}" for number in range(100)]
ROUNDS, CALLS = 5, 300
CALLERS, TAKES_S = 64, 0.1
MARK_US = 20.0


class Contestant(Protocol):
    """One cache."""

    def operations(self) -> dict[str, Callable[[], object]]:
        """What is timed; all keys are there already."""

    def stampede(self, compute: Callable[[], bytes]) -> None:
        """Let all callers ask for a key that is missing."""


class Ours:
    """In the process, and in Redis."""

    def __init__(self, url: str) -> None:
        clock = SystemClock()
        shared = share(CacheConnection(url, clock), Keys(), clock)
        self._redis = RedisCache(shared, "bench")
        self._tiered = TieredCache(Memory(clock, Counters()), self._redis)

    def operations(self) -> dict[str, Callable[[], object]]:
        redis, tiered = self._redis, self._tiered
        redis.set_many(dict.fromkeys([*MANY, "k"], VALUE))
        return {
            "hit in the process": lambda: tiered.get("k"),
            "hit in Redis": lambda: redis.get("k"),
            "hit of get or compute": lambda: redis.get_or_compute("k", lambda: VALUE),
            "set": lambda: redis.write({"s": VALUE}, replaces=False),
            "set, told to all": lambda: redis.set("s", VALUE),
            "100 of 100 in Redis": lambda: redis.get_many(MANY),
        }

    def stampede(self, compute: Callable[[], bytes]) -> None:
        in_threads(lambda: self._redis.get_or_compute("stampede", compute))


class Dogpile:
    """dogpile.cache with its lock in Redis."""

    def __init__(self, url: str) -> None:
        arguments = {"url": url, "distributed_lock": True, "thread_local_lock": False}
        self._redis = make_region().configure("dogpile.cache.redis", expiration_time=3600, arguments=arguments)
        self._local = make_region().configure("dogpile.cache.memory", expiration_time=3600)

    def operations(self) -> dict[str, Callable[[], object]]:
        redis, local = self._redis, self._local
        local.set("k", VALUE)
        redis.set_multi(dict.fromkeys([*MANY, "k"], VALUE))
        return {
            "hit in the process": lambda: local.get("k"),
            "hit in Redis": lambda: redis.get("k"),
            "hit of get or compute": lambda: redis.get_or_create("k", lambda: VALUE),
            "set": lambda: redis.set("s", VALUE),
            "100 of 100 in Redis": lambda: redis.get_multi(MANY),
        }

    def stampede(self, compute: Callable[[], bytes]) -> None:
        in_threads(lambda: self._redis.get_or_create("stampede", compute))


class OfCashews:
    """cashews, each call run to its end in a loop that exists already."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._redis, self._local = Cashews(), Cashews()
        self._redis.setup(url)
        self._local.setup("mem://")

    def _run(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    def operations(self) -> dict[str, Callable[[], object]]:
        redis, local = self._redis, self._local
        self._run(local.set("k", VALUE, expire=3600))
        for key in [*MANY, "k"]:
            self._run(redis.set(key, VALUE, expire=3600))
        return {
            "hit in the process": lambda: self._run(local.get("k")),
            "hit in Redis": lambda: self._run(redis.get("k")),
            "hit of get or compute": lambda: self._run(redis.get_or_set("k", VALUE, expire=3600)),
            "set": lambda: self._run(redis.set("s", VALUE, expire=3600)),
            "100 of 100 in Redis": lambda: self._run(redis.get_many(*MANY)),
        }

    def stampede(self, compute: Callable[[], bytes]) -> None:
        @self._redis(ttl=3600, key="stampede", lock=True)  # type: ignore[untyped-decorator]
        async def computed() -> bytes:
            return await asyncio.to_thread(compute)

        async def all_of_them() -> None:
            await asyncio.gather(*(computed() for _ in range(CALLERS)))

        self._run(all_of_them())


def in_threads(ask: Callable[[], object]) -> None:
    """Ask from all callers at once."""
    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """Return the median of each operation in microseconds, by contestant, and how often a stampede computed."""
    operations = {name: contestant.operations() for name, contestant in contestants.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for _ in range(ROUNDS):
        for name, own in operations.items():
            for what, do in own.items():
                taken[name].setdefault(what, []).extend(timed(do) for _ in range(CALLS))
    found = {name: {what: median(times) * 1e6 for what, times in own.items()} for name, own in taken.items()}
    for name, contestant in contestants.items():
        computed: list[int] = []

        def compute(computed: list[int] = computed) -> bytes:
            computed.append(1)
            time.sleep(TAKES_S)
            return VALUE

        contestant.stampede(compute)
        found[name]["computed in a stampede"] = len(computed)
    return found


def timed(do: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    began_s = time.perf_counter()
    do()
    return time.perf_counter() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as server:
        base = server.url.rpartition("/")[0]
        found = measure({"cluster_tasks": Ours(server.url), "dogpile": Dogpile(f"{base}/1"),
                         "cashews": OfCashews(f"{base}/2")})  # fmt: skip
    if options.json:
        print(json.dumps(found))
        return 0
    ours = found["cluster_tasks"]
    print(f"{'':>24}" + "".join(f"{name:>22}" for name in found) + "   (times of cluster_tasks)")
    for what in ours:
        cells = [f"{own[what]:8.1f} ({own[what] / ours[what]:4.1f}x)" if what in own else "-" for own in found.values()]
        print(f"{what:>24}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"a hit in the process: {'met' if ours['hit in the process'] < MARK_US else 'missed'} ({MARK_US:g} µs)")
    return 0


if __name__ == "__main__":
    # Listeners and loops of the contestants would wait for more.
    sys.exit(main())
