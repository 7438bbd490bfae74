"""Real nodes of which one is late with a job that another may do as well."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from celery import chord

from cluster_tasks.broker.hedging import HEDGE_PROPERTY, Hedge
from tests.process.accounts import END_S, left_over, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
NEVER_LOST = {"CLUSTER_LEASE_S": "120", "CLUSTER_HEARTBEAT_S": "1"}


def send(jobs: Jobs, hedged: Any) -> tuple[Any, Any]:
    """Send a chord of which a part goes to a and is hedged to b, the other to b.

    Returns that part and what the chord returns.
    """
    part = hedged.set(queue="node.a@test", **{HEDGE_PROPERTY: Hedge("b@test", 0.1, "tests")})
    result = chord([part, jobs.work.s().set(queue="node.b@test")], jobs.verbatim.s()).apply_async()
    return result.parent.results[0], result


def hedges(jobs: Jobs) -> int:
    return int(jobs.cluster.client.hget(jobs.cluster.keys.counters, "hedges") or 0)


def check_that_nothing_is_left(jobs: Jobs) -> None:
    wait_until_nothing_is_left(jobs)
    client, keys = jobs.cluster.client, jobs.cluster.keys
    assert not client.exists(*(key(f"{node}@test") for key in (keys.hedges, keys.hedged) for node in "ab"))
    assert not list(client.scan_iter(f"{keys.name}:kept_end:*"))
    assert jobs.cluster.stale_commits() == 0
    # Of chords a mark is left, which expires.
    assert all(client.ttl(key) > 0 for key in client.scan_iter("celery-taskset-meta-*"))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_job_of_a_stopped_node_is_done_by_the_second_before_any_failover(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    a, b = (new_worker(name, pool=pool, environ=NEVER_LOST) for name in "ab")
    with running(a, b):
        epoch = jobs.cluster.epochs.beats()[a.id].epoch
        # The first to begin takes long.
        part, result = send(jobs, jobs.stubborn.s(8.0))
        wait_until(lambda: starts_of(jobs, [part])[part.id] == 1, END_S, "it has begun")
        a.signal(signal.SIGSTOP)
        first, _ = result.get(timeout=END_S)
        assert first == b.id
        assert jobs.cluster.epochs.beats()[a.id].epoch == epoch
        assert hedges(jobs) == 1
        a.signal(signal.SIGCONT)
        check_that_nothing_is_left(jobs)
        assert starts_of(jobs, [part])[part.id] == 2
        assert "succeeded" in a.read_log()
    log = a.read_log()
    assert not any(word in log for word in ("ERROR", "Traceback", "refused", "raised outside")), log


@pytest.mark.parametrize("victim", "ab")
def test_a_job_is_done_though_one_of_its_two_nodes_is_killed(victim: str, jobs: Jobs, new_worker: NewWorker) -> None:
    nodes = {name: new_worker(name, pool="threads") for name in "abc"}
    with running(*nodes.values()):
        part, result = send(jobs, jobs.work.s(10.0))
        wait_until(lambda: starts_of(jobs, [part])[part.id] == 2, END_S, "both have begun")
        nodes[victim].kill()
        assert (result.get(timeout=END_S)[0]) in {node.id for name, node in nodes.items() if name != victim}
        wait_until(lambda: f"{victim}@test" not in jobs.cluster.epochs.beats(), END_S, "it is fenced")
        check_that_nothing_is_left(jobs)


def test_jobs_that_end_in_time_are_not_hedged(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", pool="threads"), new_worker("b", pool="threads")):
        results = []
        for _ in range(20):
            part = jobs.work.s().set(queue="node.a@test", **{HEDGE_PROPERTY: Hedge("b@test", 30.0, "tests")})
            results.append(part.apply_async())
        assert [result.get(timeout=END_S) is not None for result in results] == [True] * 20
        assert hedges(jobs) == 0
        assert set(starts_of(jobs, results).values()) == {1}
        check_that_nothing_is_left(jobs)
        assert not left_over(jobs)
