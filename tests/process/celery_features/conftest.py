"""Two nodes for all tests of a module, and what their caller needs to watch them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

from cluster_tasks.cluster import Cluster, cluster_of
from tests.process.celery_features.jobs import make_app
from tests.process.nodes import WorkerProcess, running
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer

END_S = 120.0
APP = "tests.process.celery_features.jobs"


@dataclass(frozen=True)
class Jobs:
    """The app as its callers see it, its nodes, and the tasks by their short names."""

    app: Celery
    cluster: Cluster
    nodes: tuple[WorkerProcess, ...]
    server: RedisServer
    directory: Path

    def __getattr__(self, name: str) -> Any:
        try:
            return self.app.tasks[f"features.{name}"]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def node_ids(self) -> list[str]:
        """The names of the nodes that were started with the module."""
        return [node.id for node in self.nodes]

    def new_node(self, name: str, **options: Any) -> WorkerProcess:
        """One more node, not started yet."""
        return WorkerProcess(name, self.server.url, self.directory, app=APP, **options)

    def notes(self, key: str) -> list[Any]:
        """What jobs have noted under ``key``."""
        listed: Any = self.cluster.client.lrange(f"test:{key}", 0, -1)
        return [json.loads(value) for value in listed]

    def wait_for_notes(self, key: str, count: int = 1) -> list[Any]:
        """The same, when there are as many."""
        wait_until(lambda: len(self.notes(key)) >= count, END_S, f"{count} notes of {key}")
        return self.notes(key)

    def wait_started(self, *results: Any) -> None:
        """Wait until jobs of ``hold`` run."""
        for result in results:
            self.wait_for_notes(f"started:{result.id}")

    def inspect(self, *node_ids: str) -> Any:
        """Celery's inspect, which waits for no more answers than can come."""
        asked = list(node_ids) or self.node_ids
        return self.app.control.inspect(asked, timeout=END_S, limit=len(asked))

    def command(self, name: str, *node_ids: str, **arguments: Any) -> dict[str, Any]:
        """Send a remote control command; return what each node answered."""
        asked = list(node_ids) or self.node_ids
        answers = self.app.control.broadcast(
            name, arguments, asked, reply=True, timeout=END_S, limit=len(asked)
        )  # fmt: skip
        return {node: answer for reply in answers for node, answer in reply.items()}

    @contextmanager
    def drained(self, *node_ids: str) -> Iterator[None]:
        """Nodes, else all, take no jobs."""
        for node_id in (chosen := node_ids or self.node_ids):
            self.cluster.drain(node_id)
        try:
            yield
        finally:
            for node_id in chosen:
                self.cluster.resume(node_id)

    def nothing_is_left(self) -> bool:
        """Whether no list, hash or index of the cluster holds a job."""
        client, keys = self.cluster.client, self.cluster.keys
        patterns = (f"{keys.name}:unacked:*", f"{keys.name}:remains*", "node.*", "waiting.*", keys.undecodable)
        return not self.cluster.epochs.lengths() and not any(list(client.scan_iter(pattern)) for pattern in patterns)


@contextmanager
def jobs_on_nodes(directory: Path, *names: str, leave_nothing: bool = True, **options: Any) -> Iterator[Jobs]:
    """Start a Redis and nodes; at the end no job may be left, unless tests leave some on purpose."""
    with redis_for_results(directory / "redis") as server, make_app(server.url) as app:
        nodes = [WorkerProcess(name, server.url, directory, app=APP, **options) for name in names]
        with running(*nodes):
            jobs = Jobs(app, cluster_of(app), tuple(nodes), server, directory)
            yield jobs
            if leave_nothing:
                wait_until(jobs.nothing_is_left, END_S, "every job has ended, and nothing is left of it")


@pytest.fixture(scope="module")
def jobs(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Two prefork nodes of two slots each."""
    with jobs_on_nodes(tmp_path_factory.mktemp("nodes"), "a", "b") as jobs:
        yield jobs


class Gate:
    """What jobs of ``hold`` wait for."""

    def __init__(self, jobs: Jobs) -> None:
        self.name, self._jobs = f"gate-{uuid4().hex}", jobs

    def open(self) -> None:
        """Let them go on, and all that come."""
        self._jobs.cluster.client.set(f"test:{self.name}", "open")


@pytest.fixture
def gate(jobs: Jobs) -> Iterator[Gate]:
    """A gate that is closed, and opens when the test ends, however it ends."""
    gate = Gate(jobs)
    yield gate
    gate.open()


@pytest.fixture
def busy(jobs: Jobs, gate: Gate) -> list[Any]:
    """A job on every slot of the nodes until the gate opens: what is sent now waits."""
    slots = sum(node.capacity.max_connections for node in jobs.cluster.nodes())
    results = [jobs.hold.delay(gate.name) for _ in range(slots)]
    jobs.wait_started(*results)
    return results


def values(results: Iterable[Any]) -> list[Any]:
    """The values of jobs, in their order."""
    return [result.get(timeout=END_S) for result in results]
