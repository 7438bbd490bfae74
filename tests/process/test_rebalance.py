"""Waiting jobs come to the nodes that can do them next: on join, on a beat, on demand."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.process.accounts import END_S, finish, held_key, let_go, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until


def listed(jobs: Jobs, name: str) -> int:
    """How many jobs wait in the list of a node."""
    return jobs.cluster.epochs.lengths().get(f"node.{name}@test", 0)


def rebalances(jobs: Jobs) -> int:
    """How often jobs were moved."""
    return [event.kind for event in jobs.cluster.events.latest(100)].count("rebalanced")


def test_a_node_has_its_share_when_it_joins_and_when_it_has_recovered(jobs: Jobs, new_worker: NewWorker) -> None:
    solo = {"pool": "solo", "slots": 1}
    environ = {"CLUSTER_REBALANCE_S": "3600", "CLUSTER_RECOVERY_THRESHOLD": "3"}
    with running(new_worker("a", environ=environ, **solo)):
        for _ in range(40):
            jobs.work.apply_async((2.0,), queue="node.a@test")
        joined = new_worker("b", environ=environ, **solo)
        with running(joined):
            wait_until(lambda: rebalances(jobs) == 1, END_S, "it takes its share")
            assert listed(jobs, "b") > 10
            joined.kill()
            wait_until(lambda: joined.id not in jobs.cluster.epochs.beats(), END_S, "it is fenced")
            for _ in range(20):
                jobs.work.apply_async((2.0,), queue="node.a@test")
            joined.start()
            beat = wait_until(lambda: jobs.cluster.epochs.beats().get(joined.id), END_S, "it comes back")
            got = []
            while beat.counter < 3:
                got.append(listed(jobs, "b") + jobs.cluster.client.hlen(held_key(jobs, joined.id)))
                beat = jobs.cluster.epochs.beats()[joined.id]
            # The last look may have been after the third beat.
            assert not any(got[:-2]), "it was given jobs before it had beaten three times"
            wait_until(lambda: rebalances(jobs) == 2, END_S, "it takes its share again")
            jobs.app.control.purge()
    wait_until_nothing_is_left(jobs)


def test_lists_are_balanced_on_demand_and_on_the_beat_of_a_coordinator(jobs: Jobs, new_worker: NewWorker) -> None:
    environ = {"CLUSTER_AUTO_REBALANCE": "0"}
    with running(*(new_worker(name, pool="solo", slots=1, environ=environ) for name in "ab")):
        # Both are at work, so neither takes from the other.
        first = [jobs.patient.apply_async(queue=f"node.{name}@test.bound") for name in "ab"]
        wait_until(lambda: all(jobs.cluster.client.hlen(held_key(jobs, f"{name}@test")) for name in "ab"), END_S)
        results = [jobs.work.apply_async((0.05,), queue="node.a@test") for _ in range(20)]
        assert jobs.cluster.rebalance().given == {"b@test": 10}
        assert (listed(jobs, "a"), listed(jobs, "b")) == (10, 10)
        results += [jobs.work.apply_async((0.05,), queue="node.a@test") for _ in range(20)]
        command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "coordinator", "-n", "c@test"]
        coordinator = subprocess.Popen(command, env={**os.environ, "CLUSTER_REBALANCE_S": "0.5"})
        try:
            wait_until(lambda: rebalances(jobs) == 2, END_S, "the coordinator balances the lists")
            assert (listed(jobs, "a"), listed(jobs, "b")) == (20, 20)
            let_go(jobs.cluster.client, *first)
            assert sum(finish([*first, *results]).values()) == len(first) + len(results)
        finally:
            coordinator.terminate()
            coordinator.wait()
    wait_until_nothing_is_left(jobs)
