"""What a cache costs, beside cashews and dogpile.cache on one Redis: ``python -m benchmarks.cache [--full] [--json]``.

Install the others with ``pip install '.[benchmarks]'``. All use the same server, started for this run, and values of
6 KiB, as an embedding of 1,536 numbers takes. Medians are in microseconds, taken in turns. Mark: a hit in the process
under 20 microseconds. The stampede is 64 threads (cashews: tasks of one loop) that miss one key which takes 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Protocol

from cashews import Cache as Cashews
from dogpile.cache import make_region

from benchmarks.figures import in_turn
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.stage import private_redis
from cluster_tasks.cache import Memory, RedisCache, TieredCache, share
from cluster_tasks.cache.connection import CacheConnection
from cluster_tasks.cache.counters import Counters
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys

VALUE = b"v" * 6144
MANY = [f"many{number}" for number in range(100)]
CALLERS, TAKES_S = 64, 0.1
MARK_US = 20.0
PEERS = ("dogpile.cache", "cashews")
OURS, HIT, STAMPEDE = "cluster_tasks, µs", "hit in the process", "computed in a stampede"


class Contestant(Protocol):
    """One cache."""

    def operations(self) -> dict[str, Callable[[], Any]]:
        """What is timed; all keys are there already."""

    def timed(self, do: Callable[[], Any], calls: int) -> Sequence[float]:
        """Return how many seconds each call takes."""

    def stampede(self, compute: Callable[[], bytes]) -> None:
        """Let all callers ask for a key that is missing."""


class Blocking:
    """A cache that is asked by plain calls."""

    def timed(self, do: Callable[[], Any], calls: int) -> Sequence[float]:
        return [_timed(do) for _ in range(calls)]


class Ours(Blocking):
    """In the process, and in Redis."""

    def __init__(self, url: str) -> None:
        clock = SystemClock()
        shared = share(CacheConnection(url, clock), Keys(), clock)
        self._redis = RedisCache(shared, "bench")
        self._tiered = TieredCache(Memory(clock, Counters()), self._redis)

    def operations(self) -> dict[str, Callable[[], Any]]:
        redis, tiered = self._redis, self._tiered
        redis.set_many(dict.fromkeys([*MANY, "k"], VALUE))
        return {
            HIT: lambda: tiered.get("k"),
            "hit in Redis": lambda: redis.get("k"),
            "hit of get or compute": lambda: redis.get_or_compute("k", lambda: VALUE),
            "set": lambda: redis.write({"s": VALUE}, replaces=False),
            "set, told to all": lambda: redis.set("s", VALUE),
            "100 of 100 in Redis": lambda: redis.get_many(MANY),
        }

    def stampede(self, compute: Callable[[], bytes]) -> None:
        in_threads(lambda: self._redis.get_or_compute("stampede", compute))


class Dogpile(Blocking):
    """dogpile.cache with its lock in Redis."""

    def __init__(self, url: str) -> None:
        arguments = {"url": url, "distributed_lock": True, "thread_local_lock": False}
        self._redis = make_region().configure("dogpile.cache.redis", expiration_time=3600, arguments=arguments)
        self._local = make_region().configure("dogpile.cache.memory", expiration_time=3600)

    def operations(self) -> dict[str, Callable[[], Any]]:
        redis, local = self._redis, self._local
        local.set("k", VALUE)
        redis.set_multi(dict.fromkeys([*MANY, "k"], VALUE))
        return {
            HIT: lambda: local.get("k"),
            "hit in Redis": lambda: redis.get("k"),
            "hit of get or compute": lambda: redis.get_or_create("k", lambda: VALUE),
            "set": lambda: redis.set("s", VALUE),
            "100 of 100 in Redis": lambda: redis.get_multi(MANY),
        }

    def stampede(self, compute: Callable[[], bytes]) -> None:
        in_threads(lambda: self._redis.get_or_create("stampede", compute))


class OfCashews:
    """cashews, awaited in a loop that runs: to start and stop one for each call would be no cost of its own."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._redis, self._local = Cashews(), Cashews()
        self._redis.setup(url)
        self._local.setup("mem://")

    def _run(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    def timed(self, do: Callable[[], Any], calls: int) -> Sequence[float]:
        async def all_of_them() -> list[float]:
            taken = []
            for _ in range(calls):
                began_s = time.perf_counter()
                await do()
                taken.append(time.perf_counter() - began_s)
            return taken

        found: list[float] = self._run(all_of_them())
        return found

    def operations(self) -> dict[str, Callable[[], Any]]:
        redis, local = self._redis, self._local
        self._run(local.set("k", VALUE, expire=3600))
        for key in [*MANY, "k"]:
            self._run(redis.set(key, VALUE, expire=3600))
        return {
            HIT: lambda: local.get("k"),
            "hit in Redis": lambda: redis.get("k"),
            "hit of get or compute": lambda: redis.get_or_set("k", VALUE, expire=3600),
            "set": lambda: redis.set("s", VALUE, expire=3600),
            "100 of 100 in Redis": lambda: redis.get_many(*MANY),
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


def compare(contestants: dict[str, Contestant], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Return the median of each operation in microseconds, by contestant, and how often a stampede computed."""
    operations = {name: contestant.operations() for name, contestant in contestants.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for number in range(rounds):
        for name in in_turn(operations, number):
            for what, do in operations[name].items():
                taken[name].setdefault(what, []).extend(contestants[name].timed(do, calls))
    found = {name: {what: median(times) * 1e6 for what, times in own.items()} for name, own in taken.items()}
    for name, contestant in contestants.items():
        computed: list[int] = []

        def compute(computed: list[int] = computed) -> bytes:
            computed.append(1)
            time.sleep(TAKES_S)
            return VALUE

        contestant.stampede(compute)
        found[name][STAMPEDE] = len(computed)
    return found


def _timed(do: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    do()
    return time.perf_counter() - began_s


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each operation; the ratio is that of the quickest of the others to ours."""
    with private_redis() as server:
        base = server.url.rpartition("/")[0]
        contestants: dict[str, Contestant] = {
            OURS: Ours(server.url), "dogpile, µs": Dogpile(f"{base}/1"), "cashews, µs": OfCashews(f"{base}/2"),
        }  # fmt: skip
        found = compare(contestants, options.rounds, options.calls)
    for what, ours in found[OURS].items():
        figures = {name: own[what] for name, own in found.items() if what in own}
        others = [taken for name, taken in figures.items() if name != OURS]
        if what == STAMPEDE:
            yield Row(what, {name.replace("µs", "times"): times for name, times in figures.items()})
        else:
            mark = Mark(of=OURS, below=MARK_US) if what == HIT else None
            yield Row(what, figures, ratio=min(others) / ours if others else None, mark=mark)


def main() -> int:
    benchmark = Benchmark("cache", __doc__, PEERS)
    benchmark.option("--rounds", short=2, full=5)
    benchmark.option("--calls", short=100, full=300, help="of each operation in each round")
    benchmark.note("ratio: the time of the quickest of the others over ours.")
    return benchmark.run(measure)


if __name__ == "__main__":
    # Listeners and loops of the contestants would wait for more.
    sys.exit(main())
