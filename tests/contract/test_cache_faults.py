"""A cache whose servers move, die and come back under load, and whose processes die while they compute."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot

from cluster_tasks.cache import Cache, Memory, RedisCache, TieredCache, share
from cluster_tasks.cache.connection import CacheConnection
from cluster_tasks.cache.counters import Counters
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys
from tests.contract.askers import ASKED, COMPUTED, GO, GOT
from tests.redis_cluster import RedisCluster
from tests.servers import standing_still
from tests.waiting import wait_until

END_S = 120.0
PROCESSES, THREADS = 4, 16
NAMES = [f"k{number}" for number in range(60)]
LONGEST_CALL_S = 10.0
"""Far more than the time-outs of one call; the machine is shared."""


class Traffic:
    """Threads that read, write, compute and delete; every value tells its key."""

    def __init__(self, caches: list[Cache]) -> None:
        self._caches, self._stopping = caches, threading.Event()
        self.errors: list[str] = []
        self.longest_s = 0.0
        self.hits = 0
        self._threads = [threading.Thread(target=self._run, args=(cache,)) for cache in caches for _ in range(3)]

    def _run(self, cache: Cache) -> None:
        rng = random.Random()
        while not self._stopping.is_set():
            key = rng.choice(NAMES)
            began_s = time.monotonic()
            try:
                self._use(cache, key, rng.random())
            except Exception as exc:  # noqa: BLE001 - none may reach a caller
                self.errors.append(repr(exc))
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def _use(self, cache: Cache, key: str, chance: float) -> None:
        value = f"{key}={chance}".encode()
        if chance < 0.2:
            cache.set(key, value, 30)
        elif chance < 0.4:
            found = cache.get_or_compute(key, lambda: value, 30)
            self._check(key, found)
        elif chance < 0.5:
            some = random.sample(NAMES, 10)
            for name, found in cache.get_many(some).items():
                self._check(name, found)
        else:
            found = cache.get(key)
            if found is not None:
                self.hits += 1
                self._check(key, found)

    def _check(self, key: str, found: bytes | None) -> None:
        if found is None or not found.startswith(f"{key}=".encode()):
            self.errors.append(f"{key}: {found!r}")

    def works_again(self) -> float:
        """Wait until values are found, and return after how many seconds."""
        began_s, before = time.monotonic(), self.hits
        wait_until(lambda: self.hits > before + 200, END_S, "the cache is used again")
        return time.monotonic() - began_s

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run for as long as the block lasts."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join()


@pytest.fixture
def cluster(redis_binary: str, tmp_path: Path) -> Iterator[RedisCluster]:
    """Three masters with replicas, for one test."""
    with RedisCluster(tmp_path) as made:
        yield made


@pytest.fixture
def traffic(cluster: RedisCluster) -> Iterator[Traffic]:
    """Over two connections, each with a memory of its own."""
    clock = SystemClock()
    shares = [share(CacheConnection(cluster.url, clock), Keys(), clock) for _ in range(2)]
    caches: list[Cache] = [
        TieredCache(Memory(clock, Counters()), RedisCache(shares[0], "test")), RedisCache(shares[1], "test", 60, 0.0)
    ]  # fmt: skip
    yield Traffic(caches)
    for shared in shares:
        shared.coherence.close()
        shared.connection.close()


@pytest.mark.timeout(240)
def test_a_redis_cluster_may_move_its_slots_lose_a_master_and_go_away(cluster: RedisCluster, traffic: Traffic) -> None:
    keys = Keys()
    with traffic.running():
        traffic.works_again()
        for name in NAMES[:8]:
            place = keys.cache_entry("test", name)
            others = [port for port in cluster.masters() if port != cluster.master_of(place)]
            cluster.move_slot(key_slot(place.encode()), others[0], lambda: time.sleep(0.05))
        print(f"slots moved: used again after {traffic.works_again():.1f} s")
        victim = cluster.master_of(keys.cache_state("test"))
        cluster.servers[victim].kill()
        cluster.wait_until_whole()
        print(f"a master died: used again after {traffic.works_again():.1f} s")
        cluster.servers[victim].start()
        with standing_still(*(server.pid for server in cluster.servers.values())):
            time.sleep(4)  # The fault itself.
        cluster.wait_until_whole()
        print(f"all stood still: used again after {traffic.works_again():.1f} s")
    assert traffic.errors == []
    assert traffic.longest_s < LONGEST_CALL_S


@contextmanager
def asking(url: str, first_s: float, seconds: float) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that all ask for a missing key at one moment; it takes the first so long to compute it, the others."""
    command = [sys.executable, "-m", "tests.contract.askers", url, str(THREADS), str(first_s), str(seconds)]
    processes = [subprocess.Popen(command) for _ in range(PROCESSES)]
    try:
        with redis.Redis.from_url(url) as client:
            wait_until(lambda: int(client.get(ASKED) or 0) == PROCESSES, END_S, "they are ready")
            client.set(GO, 1)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_is_missing_is_computed_once_for_all_processes(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, asking(redis_url, 0.5, 0.5) as processes:
        assert [process.wait(END_S) for process in processes] == [0] * PROCESSES
        assert client.llen(COMPUTED) == 1
        assert client.lrange(GOT, 0, -1) == [b"value"] * (PROCESSES * THREADS)


def test_who_dies_while_he_computes_is_replaced_once(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, asking(redis_url, 600.0, 1.0) as processes:
        wait_until(lambda: client.llen(COMPUTED), END_S, "one computes")
        computing: Callable[[], list[bytes]] = lambda: client.lrange(COMPUTED, 0, -1)  # noqa: E731
        (victim,) = [process for process in processes if str(process.pid).encode() in computing()]
        victim.send_signal(signal.SIGKILL)
        assert sorted(process.wait(END_S) for process in processes) == [-signal.SIGKILL, 0, 0, 0]
        assert len(computing()) == 2
        assert client.lrange(GOT, 0, -1) == [b"value"] * ((PROCESSES - 1) * THREADS)
