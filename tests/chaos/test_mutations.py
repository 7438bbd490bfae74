"""With one defence switched off, the same checker that all scenarios use reports the breach."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import states

from tests.chaos.checker import Breach
from tests.chaos.harness import FORGIVING, QUICK, Chaos, chaos_on
from tests.chaos.load import Load
from tests.chaos.nodes import Nodes
from tests.process.accounts import END_S
from tests.waiting import wait_until
from workers.redis_server import RedisServer

pytestmark = pytest.mark.chaos("short")
STANDSTILL_S = 15.0


@pytest.fixture
def chaos(redis_server: RedisServer, tmp_path: Path, rng: random.Random) -> Iterator[Chaos]:
    """A scenario that takes jobs for lost soon."""
    with chaos_on(redis_server.url, tmp_path, rng, standstill_s=STANDSTILL_S) as made:
        yield made


def mutant(name: str, **more: str) -> dict[str, Any]:
    return {"app": "tests.chaos.mutants", "environ": {**QUICK, **more, "CHAOS_MUTANT": name}}


def test_without_the_fence_a_commit_of_an_old_epoch_is_reported(chaos: Chaos) -> None:
    # What a fenced node runs must come to its end, for that to be committed.
    with chaos.nodes(2, **mutant("fence", **FORGIVING, CLUSTER_ON_FENCED="abandon")) as nodes:
        nodes.wait_ready()
        with chaos.load(kinds=("plain",), lengths_s=(3.0,), most_open=8) as load:
            victim = nodes.pick()[0]
            (other,) = (node for node in nodes.alive if node is not victim)
            wait_until(lambda: chaos.checker.runs_on(victim.id, load), END_S, "it works")
            victim.signal(signal.SIGSTOP)
            held = set(chaos.checker.runs_on(victim.id, load))
            wait_until(lambda: victim.id in chaos.checker.lost(), END_S, "it is fenced")
            load.stop()
            # Both run the same job now, whoever commits it first.
            wait_until(lambda: not held.isdisjoint(chaos.checker.runs_on(other.id, load)), END_S, "it runs elsewhere")
            victim.signal(signal.SIGCONT)
            chaos.checker.every_job_ends(load)
        with pytest.raises(Breach, match=r"^I3"):
            wait_until(chaos.checker.no_fenced_epoch_commits, STANDSTILL_S)
        with pytest.raises(Breach, match=r"^I2"):
            wait_until(chaos.checker.nothing_is_committed_twice, STANDSTILL_S)


def test_without_the_atomic_fetch_a_lost_job_is_reported(chaos: Chaos) -> None:
    with chaos.nodes(3, **mutant("fetch", **FORGIVING)) as nodes:
        nodes.wait_ready()
        with chaos.load(kinds=("plain",), lengths_s=(0.0,), pause_s=0.0) as load:
            wait_until(lambda: stand_still_with_a_job_nowhere(chaos, nodes, load), END_S, "a node has fetched")
            nodes.kill(*nodes.alive)
            nodes.add()
            with pytest.raises(Breach, match=r"^I1: .* nowhere"):
                chaos.checker.check(load, nodes.kills)


def stand_still_with_a_job_nowhere(chaos: Chaos, nodes: Nodes, load: Load) -> bool:
    """Stop all nodes. If no job is missing they go on."""
    for node in nodes.alive:
        node.signal(signal.SIGSTOP)
    try:
        chaos.checker.every_job_is_somewhere(load)
    except Breach:
        return True
    for node in nodes.alive:
        node.signal(signal.SIGCONT)
    return False


def test_without_the_count_of_crashes_a_job_that_never_ends_is_reported(chaos: Chaos) -> None:
    with chaos.nodes(1, pools=("prefork",), **mutant("crashes")) as nodes:
        nodes.wait_ready()
        load = chaos.load()
        load.accept(chaos.jobs.fatal.delay(), states.FAILURE)
        load.accept(chaos.jobs.work.delay())
        with pytest.raises(Breach, match=r"^I1"):
            chaos.checker.check(load)
