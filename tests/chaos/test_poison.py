"""Jobs that kill, swell or stall their process, and processes that are killed, among jobs that do nothing wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from celery import states

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import Chaos, chaos_on
from tests.chaos.jobs import BACKTRACKS
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until
from workers.redis_server import RedisServer


@pytest.mark.chaos("core")
@pytest.mark.timeout(600)
def test_poison_is_set_aside_and_killed_children_cost_nobody_his_job(chaos: Chaos, by_level: ByLevel) -> None:
    with chaos.nodes(2, pools=("prefork",), slots=3) as nodes:
        nodes.wait_ready()
        with chaos.load() as load:
            poisons = [load.accept(chaos.jobs.fatal.delay(), states.FAILURE) for _ in range(3)]
            for _ in range(by_level(core=4, full=40)):
                load.accept(chaos.jobs.huge.delay(), states.FAILURE)
                kill_a_child(chaos, nodes.pick()[0])
            wait_until(lambda: len(chaos.jobs.cluster.quarantine.jobs()) >= len(poisons), END_S, "poison is known")
            chaos.checker.check(load)
        assert {kept.id for kept in chaos.jobs.cluster.quarantine.jobs()} == {poison.id for poison in poisons}
        assert [worker.exit_code() for worker in nodes.alive] == [None] * 2


def kill_a_child(chaos: Chaos, worker: WorkerProcess) -> None:
    """As the kernel does when memory is short."""

    children = wait_until(psutil.Process(worker.pid).children, END_S, "the pool has processes")
    with suppress(psutil.NoSuchProcess):  # It may be the one that died of its job just then.
        chaos.rng.choice(children).kill()


@pytest.fixture
def patient_chaos(redis_server: RedisServer, tmp_path: Path, rng: random.Random) -> Iterator[Chaos]:
    """A scenario whose jobs may take minutes: two of them may share the GIL of a node, and others the machine."""
    with chaos_on(redis_server.url, tmp_path, rng, standstill_s=300.0) as made:
        yield made


@pytest.mark.chaos("short")
@pytest.mark.timeout(900)
def test_an_expression_that_backtracks_holds_no_node_for_dead(patient_chaos: Chaos, by_level: ByLevel) -> None:
    chaos = patient_chaos
    # Every setting is at its default: it lasts longer than a lease.
    length = length_that_takes(by_level(short=5.0, full=13.0))
    with chaos.nodes(3, pools=("threads", "solo", "prefork")) as nodes:
        nodes.wait_ready()
        with chaos.load(kinds=("plain", "silent"), most_open=30) as load:
            for _ in range(3):
                load.accept(chaos.jobs.match.delay(length))
            chaos.checker.check(load)
        chaos.checker.nothing_ran_twice(load)


def length_that_takes(seconds: float) -> int:
    """How long a text must be for the expression to take so long here."""
    length, began_s = 16, time.monotonic()
    BACKTRACKS.match("a" * length)
    took_s = time.monotonic() - began_s
    while took_s < seconds:
        length, took_s = length + 1, took_s * 2
    return length
