"""The wall clocks of nodes and of Redis are set forward and back by five minutes while jobs run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.chaos.clocks import SteppedClock
from tests.chaos.conftest import ByLevel
from tests.chaos.harness import POOLS, Chaos, chaos_on
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess, running
from tests.servers import redis_for_results
from tests.waiting import wait_until

STEPS_S = (-300, 0, 300)


@dataclass(frozen=True)
class Times:
    """Three nodes with a wall clock each, and a Redis with its own."""

    chaos: Chaos
    workers: list[WorkerProcess]
    clocks: list[SteppedClock]
    redis_clock: SteppedClock


@pytest.fixture
def times(redis_binary: str, tmp_path: Path, rng: random.Random) -> Iterator[Times]:
    """Every setting of time is at its default."""
    clocks = [SteppedClock(tmp_path / f"clock{number}") for number in range(len(POOLS) + 1)]
    with ExitStack() as stack:
        with patch.dict(os.environ, clocks[0].environ):
            server = stack.enter_context(redis_for_results(tmp_path / "redis"))
        chaos = stack.enter_context(chaos_on(server.url, tmp_path, rng))
        workers = [
            chaos.worker(f"n{number}", pool, environ=clock.environ)
            for number, (pool, clock) in enumerate(zip(POOLS, clocks[1:], strict=True), 1)
        ]
        stack.enter_context(running(*workers))
        yield Times(chaos, workers, clocks[1:], clocks[0])


@pytest.mark.chaos("core")
@pytest.mark.timeout(600)
def test_clocks_that_are_set_by_five_minutes_lose_and_double_nothing(times: Times, by_level: ByLevel) -> None:
    chaos, rng = times.chaos, times.chaos.rng
    with chaos.load() as load:
        for _ in range(by_level(core=4, short=8, full=60)):
            clock = rng.choice([*times.clocks, times.redis_clock, times.redis_clock])
            clock.step(rng.choice(STEPS_S))
            ended = len(chaos.history.committed)
            time.sleep(rng.uniform(0.5, 2))  # Beats, waits at doorbells and checks are under way at any instant.
            wait_until(lambda ended=ended: len(chaos.history.committed) > ended, END_S, "jobs end")
        # What is due by the clock of Redis waits for it.
        times.redis_clock.step(0)
        chaos.checker.check(load)
    chaos.checker.nothing_ran_twice(load)
    assert [worker.exit_code() for worker in times.workers] == [None] * 3
    victim = rng.choice(times.workers)
    epoch = chaos.jobs.cluster.epochs.beats()[victim.id].epoch
    for clock in times.clocks:
        clock.step(-600)
    victim.kill()
    # Whoever measured a lease by the wall clock would now wait for minutes.
    wait_until(lambda: epoch in chaos.history.fences, END_S, "a death is noticed")


@pytest.mark.chaos("short")
@pytest.mark.timeout(240)
def test_a_delayed_job_is_due_by_the_clock_of_redis(times: Times) -> None:
    chaos = times.chaos
    with chaos.load(kinds=("plain",)) as load:
        for clock in times.clocks:
            clock.step(300)
        delayed = load.accept(chaos.jobs.work.apply_async(countdown=100))
        ended = len(chaos.history.committed)
        wait_until(lambda: len(chaos.history.committed) > ended + 30, END_S, "nodes fetch many times")
        assert not delayed.ready(), "that nodes take it for late does not matter"
        times.redis_clock.step(300)
        wait_until(delayed.ready, END_S, "it is due")
        times.redis_clock.step(0)
        chaos.checker.check(load)
    chaos.checker.nothing_ran_twice(load)
