"""Nodes that do their jobs worse than the others: out, probed, and back when they are well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.process.accounts import END_S, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until

SECONDS = 0.06


@contextmanager
def under_load(jobs: Jobs) -> Iterator[list[Any]]:
    """Keep some jobs waiting; the list holds the results of all."""
    stop, results = Event(), []

    def send() -> None:
        while not stop.wait(0.05):
            if sum(jobs.cluster.epochs.lengths().values()) < 16:
                results.extend(jobs.frail.delay(SECONDS) for _ in range(8))

    thread = Thread(target=send)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()


def told(jobs: Jobs, node_id: str) -> list[str]:
    """What the events say of the breaker of a node."""
    events = jobs.cluster.events.latest(200)
    return [event.kind for event in events if event.kind.startswith("breaker") and event.facts["node"] == node_id]


@pytest.mark.timeout(240)
def test_a_node_that_fails_and_one_that_is_slow_are_ejected_probed_and_back(
    jobs: Jobs, new_worker: NewWorker, tmp_path: Path
) -> None:
    illness = {name: tmp_path / f"illness.{name}" for name in "abcd"}
    workers = [
        new_worker(name, pool="threads", environ={"CLUSTER_BREAKER_TIMEOUT_S": "1", "TEST_ILLNESS": str(file)})
        for name, file in illness.items()
    ]
    ill = {"a@test": "fails", "b@test": "24"}
    with running(*workers):
        with under_load(jobs) as results:
            wait_until(lambda: len(results) > 80, END_S, "all have a history")
            for node_id, what in ill.items():
                illness[node_id[0]].write_text(what)
            for node_id in ill:
                wait_until(lambda node_id=node_id: told(jobs, node_id), END_S, f"{node_id} is ejected")
            count = len(results)
            wait_until(lambda: len(results) > count + 100, END_S, "the others go on")
            limits = {node.id: node.limit for node in jobs.cluster.nodes()}
            assert {node_id for node_id, limit in limits.items() if limit} == set(ill)
            assert all(told(jobs, node_id) == ["breaker open"] for node_id in ill), "they are ill still"
            for node_id in ill:
                illness[node_id[0]].unlink()
            for node_id in ill:
                wait_until(lambda node_id=node_id: told(jobs, node_id)[-1] == "breaker closed", END_S, "it is back")
            count = len(results)
            wait_until(lambda: len(results) > count + 100, END_S)
        done = Counter(result.get(timeout=END_S) for result in results[count:])
        assert set(done) == {f"{name}@test" for name in illness}
        ends = [result.get(timeout=END_S, propagate=False) for result in results]
        failed = sum(isinstance(end, RuntimeError) for end in ends)
        assert failed < 0.15 * len(ends), f"{failed} of {len(ends)}"
        assert told(jobs, "c@test") == told(jobs, "d@test") == []
        wait_until_nothing_is_left(jobs)
