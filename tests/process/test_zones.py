"""Two datacentres of one cluster, and one of them dies: its jobs are done in the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.process.accounts import END_S, finish, let_each_be_followed, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import ONLY_WHEN_RUNG, WorkerProcess, running
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _this_caller_is_in_the_west(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_ZONE", "west")


@pytest.fixture
def workers(jobs: Jobs, new_worker: NewWorker, request: pytest.FixtureRequest) -> Iterator[tuple[WorkerProcess, ...]]:
    """Two nodes in each of two zones."""
    names = ("west1", "west2", "east1", "east2")
    options = {"environ": {}, **getattr(request, "param", {})}
    environ = options.pop("environ")
    made = [new_worker(name, environ={**environ, "CLUSTER_ZONE": name[:4]}, **options) for name in names]
    with running(*made):
        wait_until(lambda: len(jobs.cluster.nodes()) == len(names), END_S)
        jobs.cluster.view.refresh()
        yield tuple(made)


def zone_of(node_id: str) -> str:
    return node_id[:4]


def placed_in(jobs: Jobs) -> str:
    """The zone in which a job would be placed now."""
    route = jobs.cluster.router(jobs.work.name, (), {}, {}, task=jobs.work)
    assert route is not None
    node_id = jobs.cluster.keys.node_of(route["queue"].name)
    assert node_id is not None
    return zone_of(node_id)


def finish_each(jobs: Jobs, number: int) -> Counter[str]:
    """Send jobs, each when the one before has ended; count them by node. All are placed in the west."""
    done = Counter[str]()
    for _ in range(number):
        # Who sends faster than it looks counts jobs that have ended, and would spare a zone that is free.
        jobs.cluster.view.refresh()
        assert placed_in(jobs) == "west"
        done[jobs.work.delay(0.0).get(timeout=END_S)] += 1
    return done


def by_zone(done: Counter[str]) -> Counter[str]:
    return Counter(zone_of(node_id) for node_id in done.elements())


def zones_that_ended(results: list[Any]) -> Counter[str]:
    """Count jobs that have ended by the zone that did them."""
    return Counter(zone_of(result.result) for result in results if result.ready())


def test_a_zone_that_dies_spills_over_to_the_other_and_nothing_is_lost(
    jobs: Jobs, workers: tuple[WorkerProcess, ...]
) -> None:
    assert {node.id: node.zone for node in jobs.cluster.nodes()} == {each.id: zone_of(each.id) for each in workers}
    # One after the other, none has to leave the caller's zone; but who looks for work may be sooner than who is rung.
    alone = by_zone(finish_each(jobs, 30))
    assert alone["west"] > alone["east"]

    # A whole load of them keeps both zones at work.
    results = [jobs.work.delay(0.3, key=f"session {number}") for number in range(120)]
    wait_until(lambda: zones_that_ended(results)["west"], END_S, "both zones work")
    for worker in workers[:2]:
        worker.kill()
    in_time = zones_that_ended(results)["west"]
    during = [jobs.work.delay(0.0, key=f"session {number}") for number in range(40)]
    wait_until(lambda: len(jobs.cluster.nodes()) == 2, END_S, "the dead nodes are fenced")
    jobs.cluster.view.refresh()
    after = [jobs.work.delay(0.0) for _ in range(20)]

    # A process of a dead node ends what it had begun, if it does so before the fence.
    done = by_zone(finish(results))
    assert in_time <= done["west"] <= in_time + 4
    finish(during)
    assert set(by_zone(finish(after))) == {placed_in(jobs)} == {"east"}
    wait_until_nothing_is_left(jobs)


@pytest.mark.parametrize("workers", [ONLY_WHEN_RUNG], indirect=True, ids=["only when rung"])
def test_no_node_of_another_zone_is_idle_while_the_callers_own_queues(
    jobs: Jobs, workers: tuple[WorkerProcess, ...]
) -> None:
    # All are placed here, and the bound lets them stay: who has nothing to do takes them all the same.
    results = [jobs.patient.apply_async(queue="node.west1@test") for _ in range(24)]
    let_each_be_followed(jobs, results, [worker.id for worker in workers], slots=2)
    assert set(finish(results).values()) == {6}
    wait_until_nothing_is_left(jobs)
