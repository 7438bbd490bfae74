"""A master, a replica and three Sentinels, of which two agree on a failover."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.process.accounts import END_S
from tests.servers import free_ports, redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer, find_redis_server
from workers.tether import tethered, tethering

MASTER = "mymaster"
SENTINELS = 3


@dataclass(frozen=True)
class Replicated:
    """Two servers; ``first`` is the master until something happens to it."""

    first: RedisServer
    second: RedisServer
    ports: list[int]
    """Of the Sentinels."""

    @property
    def url(self) -> str:
        """Where nodes and producers find whoever is master."""
        return ";".join(f"sentinel://127.0.0.1:{port}/0" for port in self.ports)

    def wait_switched(self) -> None:
        """Wait until a Sentinel names the second server as master, and it is one."""
        with redis.Redis(port=self.ports[0]) as sentinel, redis.Redis(port=self.second.port) as second:
            wait_until(
                lambda: sentinel.sentinel_get_master_addr_by_name(MASTER) == (b"127.0.0.1", self.second.port), END_S
            )
            wait_until(lambda: second.role()[0] == b"master", END_S, "it is master")

    def wait_demoted(self) -> None:
        """Wait until the first server follows the second."""
        with redis.Redis(port=self.first.port) as first:
            wait_until(lambda: first.role()[0] == b"slave" and first.role()[3] == b"connected", END_S, "it follows")

    def stop_replicating(self) -> None:
        """Let the second server hear nothing more of the first."""
        with redis.Redis(port=self.first.port) as first, redis.Redis(port=self.second.port) as second:
            second.config_set("masterauth", "of another")
            first.client_kill_filter(_type="replica")
            wait_until(lambda: not first.info("replication")["connected_slaves"], END_S, "it is cut off")


@contextmanager
def replicated(directory: Path, *options: str) -> Iterator[Replicated]:
    """Run all of them. ``options`` are lines of the first server's configuration."""
    with ExitStack() as stack:
        first = stack.enter_context(redis_for_results(directory / "first", appendonly=True, extra=options))
        lines = [f"replicaof 127.0.0.1 {first.port}"]
        second = stack.enter_context(redis_for_results(directory / "second", appendonly=True, extra=lines))
        with redis.Redis(port=second.port) as client:
            wait_until(lambda: client.role()[3] == b"connected", END_S, "the replica follows")
        ports = free_ports(SENTINELS)
        for port in ports:
            stack.enter_context(_sentinel(directory / f"sentinel{port}", port, first.port))
        for port in ports:
            wait_until(lambda port=port: _knows_all(port), END_S, "the Sentinels know each other")
        yield Replicated(first, second, ports)


@contextmanager
def _sentinel(home: Path, port: int, master_port: int) -> Iterator[None]:
    home.mkdir()
    lines = [
        *(f"port {port}", "bind 127.0.0.1", f"dir {home}"),
        f"sentinel monitor {MASTER} 127.0.0.1 {master_port} 2",
        f"sentinel down-after-milliseconds {MASTER} 1000",
        f"sentinel failover-timeout {MASTER} 5000",
    ]
    (home / "sentinel.conf").write_text("\n".join([*lines, ""]))
    command = tethered(signal.SIGTERM, [find_redis_server(), str(home / "sentinel.conf"), "--sentinel"])
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=tethering(), stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(END_S)


def _knows_all(port: int) -> bool:
    with suppress(redis.RedisError), redis.Redis(port=port) as sentinel:
        master = sentinel.sentinel_master(MASTER)
        return bool(master["num-slaves"] == 1 and master["num-other-sentinels"] == SENTINELS - 1)
    return False
