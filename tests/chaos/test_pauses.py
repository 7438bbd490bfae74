"""Heartbeats that stop while their node works, and nodes that pause on a busy machine and are not to be fenced."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, PATIENT, Chaos
from tests.chaos.threads import pausing
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until

PAUSE_S = 1.5
"""With a beat a second and a lease of three, a node that is scheduled late can bear so much."""

LATE_S = 0.1


@pytest.mark.chaos("short")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_node_whose_heartbeat_alone_stops_fences_itself(pool: str, chaos: Chaos) -> None:
    with chaos.nodes(3, pools=(pool,), environ=PATIENT | FORGIVING) as nodes:
        nodes.wait_ready()
        with chaos.load(lengths_s=(0.0, 0.05, 2.0)) as load:
            victim = nodes.pick()[0]
            epoch = chaos.checker.epoch_of(victim.id)
            with pausing(chaos.jobs.app, victim, "cluster-heartbeat"):
                chaos.checker.wait_fenced(epoch)
                wait_until(lambda: len(chaos.history.committed) > 50, END_S, "the others work on")
            wait_until(lambda: chaos.checker.epoch_of(victim.id) not in ("", epoch), END_S, "it joins anew")
            chaos.checker.check(load, also_lost=[victim.id])
        assert victim.exit_code() is None


@pytest.mark.chaos("short")
@pytest.mark.timeout(900)
def test_pauses_under_saturated_processors_are_no_deaths(chaos: Chaos, by_level: ByLevel) -> None:
    seconds = by_level(short=20, full=600)
    # Every setting is at its default.
    with chaos.nodes(3, pools=("prefork", "threads", "solo")) as nodes:
        nodes.wait_ready()
        kinds = ("plain", "delayed", "burning", "burning", "hogging")
        with chaos.load(kinds=kinds, most_open=30) as load:
            until_s, longer = time.monotonic() + seconds, set()
            while time.monotonic() < until_s:
                worker = nodes.pick()[0]
                if pause(worker) > PAUSE_S + LATE_S:
                    longer.add(worker.id)
                seen = chaos.jobs.cluster.epochs.beats().get(worker.id)
                wait_until(lambda w=worker, s=seen: chaos.jobs.cluster.epochs.beats().get(w.id) != s, END_S, "it beats")
                time.sleep(chaos.rng.uniform(0, 1))  # Beats are not in step with pauses.
            # Where this process was itself so late that a pause was longer, nothing is shown.
            chaos.checker.check(load, also_lost=longer)


def pause(worker: WorkerProcess) -> float:
    """Let a node and all its processes stand still, as a machine does that swaps or moves; return how long it did."""
    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    began_s = time.monotonic()
    for member in family:
        member.suspend()
    time.sleep(PAUSE_S)  # The fault itself.
    for member in family:
        member.resume()
    return time.monotonic() - began_s
