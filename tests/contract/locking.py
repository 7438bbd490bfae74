"""What the tests of locks share: the servers that locks live in, a resource that checks tokens, and other processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from cluster_tasks.addresses.consul import parse_consul_url
from cluster_tasks.addresses.etcd import parse_etcd_url
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import LockLost
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks, RedisLocks
from cluster_tasks.locks.base import check_name
from cluster_tasks.locks.consul import ConsulLocks
from cluster_tasks.locks.etcd import EtcdLocks
from cluster_tasks.redis_store import connect
from tests.consul_server import ConsulServer
from tests.etcd_server import EtcdServer
from tests.servers import standing_still
from workers.redis_server import RedisServer

END_S = 120.0
SPAWN = get_context("spawn")


OpenLocks = Callable[[], Locks]


class Stage(Protocol):
    """A server that locks live in."""

    ttl_s: float
    """A short TTL that this service can keep, and that a test on a busy machine can renew in time."""

    @property
    def open(self) -> Callable[[], Locks]:
        """Opens one more client, as another process would; it can be sent to one."""

    def forget(self, name: str) -> None:
        """End whoever holds a lock, by the service's own means."""

    def kill(self) -> None:
        """End the server at once."""

    def start(self) -> None:
        """Start it again, with what it had written."""

    def paused(self) -> AbstractContextManager[None]:
        """Let it hang for as long as the block lasts."""


def open_redis(url: str, cluster: str = "contract") -> Locks:
    return Locks(RedisLocks(url, Keys(cluster)), SystemClock())


class RedisStage:
    """Locks in Redis."""

    ttl_s = 4.0

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.open = partial(open_redis, server.url)
        self.kill, self.start = server.kill, server.start

    def paused(self) -> AbstractContextManager[None]:
        return standing_still(self._server.pid)

    def forget(self, name: str) -> None:
        with connect(self._server.url) as client:
            assert client.delete(Keys("contract").lock(check_name(name)))


def open_etcd(url: str) -> Locks:
    return Locks(EtcdLocks(parse_etcd_url(url), Keys("contract")), SystemClock())


class EtcdStage:
    """Locks in etcd."""

    ttl_s = 4.0

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self.open = partial(open_etcd, server.url)
        self.kill, self.start, self.paused = server.kill, server.start, server.paused

    def forget(self, name: str) -> None:
        key = b64encode(f"/test/contract/locks/{check_name(name)}".encode()).decode()
        found = self._server.ask("kv/range", key=key)["kvs"][0]
        self._server.ask("lease/revoke", ID=found["lease"])


def open_consul(url: str) -> Locks:
    return Locks(ConsulLocks(parse_consul_url(url), Keys("contract")), SystemClock())


class ConsulStage:
    """Locks in Consul."""

    ttl_s = 10.0

    def __init__(self, server: ConsulServer) -> None:
        self._server = server
        self.open = partial(open_consul, server.url())
        self.kill, self.start = server.kill, server.start

    def paused(self) -> AbstractContextManager[None]:
        return standing_still(self._server.pid)

    def forget(self, name: str) -> None:
        # The address decodes it once.
        found = self._server.api("GET", f"/v1/kv/cluster-tasks/contract/locks/{quote(check_name(name))}")
        self._server.api("PUT", f"/v1/session/destroy/{found[0]['Session']}")


class Resource:
    """A table that keeps the highest token it has seen, and refuses lower ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._rows() as rows:
            rows.execute("CREATE TABLE IF NOT EXISTS written (number INTEGER PRIMARY KEY, by TEXT, token INTEGER)")

    @contextmanager
    def _rows(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=END_S)) as rows, rows:
            yield rows

    def write(self, by: str, token: int) -> bool:
        """Add a row; False: refused."""
        newest = "NOT EXISTS (SELECT 1 FROM written WHERE token > ?)"
        with self._rows() as rows:
            row = (by, token, token)
            return rows.execute(f"INSERT INTO written (by, token) SELECT ?, ? WHERE {newest}", row).rowcount == 1

    def read(self) -> list[tuple[str, int]]:
        """Who wrote, with which token, in the order of the writes."""
        with self._rows() as rows:
            return list(rows.execute("SELECT by, token FROM written ORDER BY number"))


def take_turns(open_locks: Callable[[], Locks], name: str, path: Path, threads: int, turns: int, ttl_s: float) -> None:
    """In each of some threads take the lock again and again, and fail if another is at work meanwhile."""
    at_work, resource = path / "at work", Resource(path / "resource")

    def work(thread: int) -> None:
        with closing(open_locks()) as locks:
            for _ in range(turns):
                with locks.acquire(name, ttl_s=ttl_s, wait_s=END_S) as held:
                    with at_work.open("x"):
                        assert resource.write(f"{os.getpid()}/{thread}", held.token)
                    at_work.unlink()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, thread) for thread in range(threads)]:
            done.result()


def write_until_refused(open_locks: Callable[[], Locks], name: str, path: Path, ttl_s: float, end: Connection) -> None:
    """Hold a lock, renew it and write; when that fails, tell what the holder of an old token is told."""
    resource, told = Resource(path), []
    with closing(open_locks()) as locks:
        held = locks.acquire(name, ttl_s=ttl_s, wait_s=END_S)
        try:
            while resource.write("first", held.token):
                end.send("wrote")
                held.renew()
                time.sleep(ttl_s / 20)
        except LockLost:
            told.append("renewal refused")
        told.append("left" if held.left_s else "nothing left")
        told.append("written" if resource.write("first", held.token) else "write refused")
        for call in (held.renew, held.release):
            try:
                call()
            except LockLost:
                told.append("refused")
    end.send(told)


@contextmanager
def writer(stage: Stage, name: str, path: Path) -> Iterator[tuple[int, Connection]]:
    """Run ``write_until_refused`` in a process of its own; give its pid and what it tells."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=write_until_refused, args=(stage.open, name, path, stage.ttl_s, theirs))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid, ours
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()
