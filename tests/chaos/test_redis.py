"""Redis restarts, stalls, refuses and forgets under load: nothing is lost, nothing runs twice, nobody is fenced."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import POOLS, Chaos, chaos_on
from tests.chaos.nodes import Nodes
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer, find_redis_server

Fault = Callable[[RedisServer, float], None]
AGAIN_S = 10.0
"""Promised: so long after Redis is back, every node works."""
BUSY_S = 10.0
"""More than that, on a machine that other tests share."""


@pytest.fixture
def lasting_redis(redis_binary: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that keeps what it was told over a restart, and may be told to sleep."""
    told = subprocess.run([find_redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    # Before 7 every Redis may.
    sleeps = [] if "v=6." in told else ["enable-debug-command local"]
    with redis_for_results(tmp_path / "redis", appendonly=True, extra=sleeps) as server:
        yield server


@pytest.fixture
def outage(
    lasting_redis: RedisServer, redis_server: RedisServer, tmp_path: Path, rng: random.Random
) -> Iterator[Chaos]:
    """A scenario whose Redis is at fault; what tasks note goes to another one."""
    with chaos_on(lasting_redis.url, tmp_path, rng, notes_url=redis_server.url) as chaos:
        yield chaos


def stopped(server: RedisServer, seconds: float) -> None:
    process = psutil.Process(server.pid)
    process.suspend()
    time.sleep(seconds)  # The fault itself, as in the others.
    process.resume()


def asleep(server: RedisServer, seconds: float) -> None:
    with redis.Redis.from_url(server.url, socket_timeout=None) as client:
        client.execute_command("DEBUG", "SLEEP", seconds)


def restarted(server: RedisServer, seconds: float) -> None:
    server.kill()
    time.sleep(seconds)
    server.start()


def out_of_memory(server: RedisServer, seconds: float) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "1")
        time.sleep(seconds)
        client.config_set("maxmemory", "0")


def forgetful(server: RedisServer, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    with redis.Redis.from_url(server.url) as client:
        while time.monotonic() < until_s:
            client.script_flush()
            time.sleep(0.05)


def strike(chaos: Chaos, nodes: Nodes, server: RedisServer, fault: Fault, seconds: float) -> None:
    """Let a fault last so long, and wait until every node works again."""
    fault(server, seconds)
    over_s, history = time.monotonic(), chaos.history
    before = len(history.commits)

    def working() -> set[str]:
        return {commit.epoch for commit in history.commits[before:]}

    wait_until(lambda: len(working()) >= len(nodes.alive), AGAIN_S + BUSY_S, f"after {fault.__name__}, all work again")
    print(f"{fault.__name__} for {seconds:g} s: all nodes worked again after {time.monotonic() - over_s:.1f} s")


def hold_against_the_promises(
    chaos: Chaos, server: RedisServer, faults: list[tuple[Fault, float]], *, may_repeat: bool = False
) -> None:
    # Every setting of time is at its default.
    with chaos.nodes(3, pools=POOLS) as nodes:
        nodes.wait_ready()
        with chaos.load() as load:
            for fault, seconds in faults:
                strike(chaos, nodes, server, fault, seconds)
            chaos.checker.check(load)
        if not may_repeat:
            chaos.checker.nothing_ran_twice(load)
        assert [worker.exit_code() for worker in nodes.alive] == [None] * 3


@pytest.mark.chaos("core")
@pytest.mark.timeout(180)
def test_a_redis_that_stalls_restarts_refuses_and_forgets_costs_nothing(
    outage: Chaos, lasting_redis: RedisServer
) -> None:
    faults: list[tuple[Fault, float]] = [(forgetful, 0.5), (out_of_memory, 1), (stopped, 1), (restarted, 1)]
    outage.rng.shuffle(faults)
    hold_against_the_promises(outage, lasting_redis, faults)


@pytest.mark.chaos("short")
@pytest.mark.timeout(900)
def test_stalls_longer_than_every_time_out_cost_nothing(
    outage: Chaos, lasting_redis: RedisServer, by_level: ByLevel
) -> None:
    faults: list[tuple[Fault, float]] = by_level(
        short=[(asleep, 5), (stopped, 20)],
        full=[(fault, length) for fault in (asleep, stopped) for length in (1, 5, 20)] * 2,
    )
    hold_against_the_promises(outage, lasting_redis, faults)


@pytest.mark.chaos("full")
@pytest.mark.timeout(900)
def test_long_outages_of_every_kind_cost_nothing(outage: Chaos, lasting_redis: RedisServer) -> None:
    lengths = {fault: outage.rng.uniform(2, 40) for fault in (restarted, out_of_memory, forgetful)}
    # An end that cannot be stored is tried again for 20 s; then the job is let lie, and runs again.
    hold_against_the_promises(outage, lasting_redis, list(lengths.items()), may_repeat=True)
