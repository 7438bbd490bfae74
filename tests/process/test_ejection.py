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
            if sum(jobs.cluster.epochs.lengths().values()) < 12:
                results.extend(jobs.frail.delay(SECONDS) for _ in range(6))

    thread = Thread(target=send)
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()


def done_by(results: list[Any]) -> Counter[str]:
    """How many of the jobs that have succeeded were done by each node."""
    return Counter(result.get() for result in results if result.successful())


def told(jobs: Jobs, node_id: str) -> list[str]:
    """What the events say of the breaker of a node."""
    events = jobs.cluster.events.latest(200)
    return [event.kind for event in events if event.kind.startswith("breaker") and event.facts["node"] == node_id]


@pytest.mark.timeout(240)
def test_a_node_that_fails_and_one_that_is_slow_are_ejected_probed_and_back(
    jobs: Jobs, new_worker: NewWorker, tmp_path: Path
) -> None:
    illness = {name: tmp_path / f"illness.{name}" for name in "abc"}
    environ = {"CLUSTER_BREAKER_TIMEOUT_S": "1"}
    workers = [
        new_worker(name, pool="threads", environ={**environ, "TEST_ILLNESS": str(file)})
        for name, file in illness.items()
    ]
    with running(*workers):
        with under_load(jobs) as results:
            wait_until(lambda: len(results) > 60, END_S, "all have a history")
            for name, what in ("a", "fails"), ("b", "12"):
                node_id = f"{name}@test"
                illness[name].write_text(what)
                wait_until(lambda node_id=node_id: told(jobs, node_id), END_S, f"{node_id} is ejected")
                count, seen = len(results), set()
                while len(results) < count + 100:
                    seen.add({node.id: node.limit for node in jobs.cluster.nodes()}[node_id])
                assert seen & {"ejected", "half-open", "probing"}
                assert told(jobs, node_id) == ["breaker open"], "it is ill still"
                assert len([node for node in jobs.cluster.nodes() if node.limit]) == 1
                illness[name].unlink()
                wait_until(lambda node_id=node_id: "breaker closed" in told(jobs, node_id), END_S, f"{node_id} is back")
                wait_until(lambda: not any(node.limit for node in jobs.cluster.nodes()), END_S)
                count = len(results)
                wait_until(
                    lambda count=count, node_id=node_id: done_by(results[count:])[node_id] >= 10, END_S,
                    "it has its share again",
                )  # fmt: skip
        ends = [result.get(timeout=END_S, propagate=False) for result in results]
        failed = sum(isinstance(end, RuntimeError) for end in ends)
        assert failed < 0.1 * len(ends), f"{failed} of {len(ends)}"
        assert told(jobs, "c@test") == []
        wait_until_nothing_is_left(jobs)
