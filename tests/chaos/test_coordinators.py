"""A coordinator is killed at each step of a failover; whoever takes over, the failover is finished, once."""

from __future__ import annotations

import random
import re
from functools import partial

import pytest

from benchmarks.forks import END_S, Fork, Forks
from tests.chaos.conftest import ByLevel
from tests.chaos.stage import VICTIM, Stage
from tests.waiting import wait_until

AT_ONCE = 6
"""Clusters, each with a failover of its own, that share the machine."""
WAYS = ("another comes", "nodes alone", "two at once", "five at once")


def count_commands(forks: Forks, url: str) -> int:
    """How many commands there are to die at, if Redis knows all scripts."""
    first = Stage.set_up(forks, url, "first")
    assert first.cluster.health.fail_over(VICTIM, first.cluster.epochs.beats()[VICTIM], 3.0)
    first.cluster.health.tell_registry()
    stage = Stage.set_up(forks, url, "second")
    count = wait_until(partial(commands_told, stage.coordinator("alone")), END_S, "a coordinator fails over")
    for done in (first, stage):
        done.wait_finished()
        done.check_where_jobs_wait()
    return count


def commands_told(coordinator: Fork) -> int:
    found = re.search(r"commands of a failover: (\d+)\.", coordinator.read_log())
    return int(found[1]) if found else 0


def fail_over(stage: Stage, doomed: Fork, way: str) -> None:
    """Let others take over from a coordinator that dies. Of several at once, it may not be the one that acts."""
    if way in ("another comes", "nodes alone"):
        # How many commands a failover takes differs: this one may be over before it comes to its last step.
        wait_until(lambda: doomed.poll() is not None or commands_told(doomed), END_S, "it dies or has failed over")
    if way == "nodes alone":
        stage.worker("heir")
    else:
        for number in range(4 if way == "five at once" else 1):
            stage.coordinator(f"heir{number}")


def check(stage: Stage, doomed: Fork, way: str) -> None:
    stage.wait_finished()
    if doomed.poll() is not None:
        stage.wait_finished("doomed@test")
    if way == "nodes alone":
        stage.wait_done()
    else:
        stage.check_where_jobs_wait()


@pytest.mark.chaos("core")
@pytest.mark.timeout(1800)
def test_a_failover_whose_coordinator_dies_at_any_step_is_finished_once(
    forks: Forks, redis_url: str, by_level: ByLevel, rng: random.Random
) -> None:
    steps = range(count_commands(forks, redis_url))
    assert len(steps) > 15
    of_each = [(at, WAYS[at % len(WAYS)]) for at in steps]
    cases = by_level(
        core=[(at, way) for at, way in zip(rng.sample(steps, len(WAYS)), WAYS, strict=True)],
        short=of_each, full=[(at, way) for way in WAYS for at in steps],
    )  # fmt: skip
    for first in range(0, len(cases), AT_ONCE):
        under_way = []
        for number, (at, way) in enumerate(cases[first : first + AT_ONCE], first):
            stage = Stage.set_up(forks, redis_url, f"case{number}")
            under_way.append((stage, stage.coordinator("doomed", TEST_DIE_AT=str(at)), way))
        for do in (fail_over, check):
            for stage, doomed, way in under_way:
                do(stage, doomed, way)
        forks.stop()
