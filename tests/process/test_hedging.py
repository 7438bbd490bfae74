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
from tests.process.nodes import NEVER_LOST, running
from tests.waiting import wait_until

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")


def send(jobs: Jobs, hedged: Any, other: str = "b@test") -> tuple[Any, Any, Any]:
    """Send a chord of which a part goes to a and is hedged to b, the other to the node ``other``.

    Returns both parts and what the chord returns.
    """
    part = hedged.set(queue="node.a@test", **{HEDGE_PROPERTY: Hedge("b@test", 0.1, "tests")})
    result = chord([part, jobs.work.s().set(queue=f"node.{other}")], jobs.verbatim.s()).apply_async()
    return *result.parent.results, result


def waits(jobs: Jobs, node_id: str) -> bool:
    """Whether a node waits at its doorbell, with nothing to do."""
    return jobs.cluster.client.zscore(jobs.cluster.keys.idle, f"node.{node_id}") is not None


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


@pytest.mark.parametrize(("late", "pool"), [("a", "prefork"), ("a", "threads"), ("b", "threads")])
def test_a_job_of_a_stopped_node_is_done_by_the_other_before_any_failover(
    late: str, pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    """What b is late with was sent to a: b took it from there, and a is to do it as well."""
    a, b = (new_worker(name, pool=pool, environ=NEVER_LOST) for name in "ab")
    first, second = (a, b) if late == "a" else (b, a)
    with running(a, b):
        epoch = jobs.cluster.epochs.beats()[first.id].epoch
        # A node that fetches could take the job from the list of the other before that one gets to it.
        wait_until(lambda: waits(jobs, second.id), END_S, f"{second.id} has nothing to do")
        second.signal(signal.SIGSTOP)
        # The first to begin takes long.
        part, other, result = send(jobs, jobs.stubborn.s(8.0), first.id)
        wait_until(lambda: starts_of(jobs, [part])[part.id] == 1, END_S, "it has begun")
        wait_until(other.ready, END_S, "all else is done")
        first.signal(signal.SIGSTOP)
        second.signal(signal.SIGCONT)
        assert result.get(timeout=END_S)[0] == second.id
        assert jobs.cluster.epochs.beats()[first.id].epoch == epoch
        assert hedges(jobs) == 1
        first.signal(signal.SIGCONT)
        check_that_nothing_is_left(jobs)
        assert starts_of(jobs, [part])[part.id] == 2
        assert "succeeded" in first.read_log()
    log = first.read_log()
    assert not any(word in log for word in ("ERROR", "Traceback", "refused", "raised outside")), log


@pytest.mark.parametrize("victim", "ab")
def test_a_job_is_done_though_one_of_its_two_nodes_is_killed(victim: str, jobs: Jobs, new_worker: NewWorker) -> None:
    nodes = {name: new_worker(name, pool="threads") for name in "abc"}
    with running(*nodes.values()):
        part, _, result = send(jobs, jobs.work.s(10.0))
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
