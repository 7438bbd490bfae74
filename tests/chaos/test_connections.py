"""The connections of single nodes are killed, slowed down, reset and left hanging under load."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, POOLS, Chaos, chaos_on
from tests.process.nodes import WorkerProcess, running
from tests.process.proxy import Cut, Wire, wire_to
from workers.redis_server import RedisServer

LENGTHS_S = (0.0, 0.05, 0.3, 2.0)
"""Long enough that a job runs on while its node connects anew."""


@dataclass(frozen=True)
class Wired:
    """Three nodes with a wire each."""

    chaos: Chaos
    workers: list[WorkerProcess]
    wires: list[Wire]


@pytest.fixture
def wired(redis_server: RedisServer, tmp_path: Path, rng: random.Random) -> Iterator[Wired]:
    """Every setting of time is at its default."""
    with ExitStack() as stack:
        wires = [stack.enter_context(wire_to(redis_server.port)) for _ in POOLS]
        chaos = stack.enter_context(chaos_on(redis_server.url, tmp_path, rng))
        workers = [
            chaos.worker(f"n{number}", pool, broker_url=wire.url, environ=FORGIVING)
            for number, (pool, wire) in enumerate(zip(POOLS, wires, strict=True), 1)
        ]
        stack.enter_context(running(*workers))
        yield Wired(chaos, workers, wires)


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_a_node_whose_connections_are_killed_goes_on_with_what_it_has(wired: Wired, by_level: ByLevel) -> None:
    chaos = wired.chaos
    client = chaos.jobs.cluster.client
    with chaos.load(lengths_s=LENGTHS_S) as load:
        for _ in range(by_level(short=12, full=120)):
            time.sleep(chaos.rng.uniform(0, 1))
            for address in chaos.rng.choice(wired.wires).addresses:
                client.client_kill_filter(addr=address)
        chaos.checker.check(load)
    chaos.checker.nothing_ran_twice(load)
    assert [worker.exit_code() for worker in wired.workers] == [None] * 3


def slow(wire: Wire) -> None:
    wire.latency_s = 0.2
    time.sleep(2)
    wire.latency_s = 0.0


def held_up(wire: Wire) -> None:
    wire.hold(requests=False, replies=True)
    time.sleep(1)
    wire.hold(requests=False, replies=False)


def fallen_silent(wire: Wire) -> None:
    wire.freeze()
    time.sleep(0.5)
    wire.thaw()
    time.sleep(6)  # Until every time-out of the node has passed.


def reset(wire: Wire) -> None:
    wire.cut_replies(3, Cut.RESET)
    time.sleep(1)


def closed_late(wire: Wire) -> None:
    wire.cut_replies(3, Cut.LATE)
    time.sleep(2)


@pytest.mark.chaos("short")
@pytest.mark.timeout(900)
def test_slow_silent_reset_and_lingering_connections_lose_and_double_nothing(wired: Wired, by_level: ByLevel) -> None:
    chaos = wired.chaos
    faults: list[Callable[[Wire], None]] = [slow, held_up, fallen_silent, reset, closed_late]
    silent = set()
    with chaos.load(lengths_s=LENGTHS_S) as load:
        for fault in chaos.rng.sample(faults, len(faults)) * by_level(short=1, full=6):
            number = chaos.rng.randrange(len(POOLS))
            fault(wired.wires[number])
            # A beat that gets no answer for longer than a lease is none.
            silent |= {wired.workers[number].id} if fault in (fallen_silent, closed_late) else set()
        chaos.checker.check(load, also_lost=silent)
    if not chaos.checker.lost():
        chaos.checker.nothing_ran_twice(load)
    assert [worker.exit_code() for worker in wired.workers] == [None] * 3
