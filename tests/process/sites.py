"""Nodes that hold shards, who sends jobs to them, and searches that go on whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.cluster import cluster_of
from cluster_tasks.shards.store import CollectionStore
from cluster_tasks.tasks import rag, retrieval
from cluster_tasks.tasks.ready_made import backends_of
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until

# Celery has a connection for results in each thread, and leaves it to be collected with the thread.
of_a_thread = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
DECLARED = (rag, retrieval)
SHARDS, COUNT = 8, 80
WORDS = ["whale", "eagle", "mouse", "tiger", "zebra", "otter", "raven", "snake"]
DOCUMENTS = [{"id": f"d{number}", "text": f"The {WORDS[number % 8]} of house {number}."} for number in range(COUNT)]


@dataclass
class Site:
    """Who sends jobs to nodes that hold shards."""

    app: Celery
    new_node: Callable[..., WorkerProcess]

    @property
    def cluster(self) -> Cluster:
        return cluster_of(self.app)

    @property
    def store(self) -> CollectionStore:
        return backends_of(self.app).store

    def send(self, job: str, *args: Any, **kwargs: Any) -> Any:
        return self.app.tasks[job].delay(*args, **kwargs)

    def get(self, job: str, *args: Any, **kwargs: Any) -> Any:
        return self.send(job, *args, **kwargs).get(timeout=END_S)

    def ids(self, *args: Any, **kwargs: Any) -> list[str]:
        """What a search finds."""
        return [passage["id"] for passage in self.get("retrieval.search", *args, **kwargs)["passages"]]

    def fill(self, collection: str = "docs", documents: list[dict[str, str]] = DOCUMENTS) -> None:
        assert self.get("retrieval.add_documents", collection, documents)["count"] == len(documents)

    def ready(self, collection: str = "docs") -> list[frozenset[str]]:
        found = self.cluster.assignments.whereabouts(collection)
        return list(found.ready) if found else []

    def wait_until_ready(self, replicas: int, collection: str = "docs", nodes: int | None = None) -> None:
        """Wait until every shard is in memory where it is to be, on so many nodes each."""

        def are_ready() -> bool:
            found = self.cluster.assignments.whereabouts(collection)
            if found is None:
                return False
            held = list(map(frozenset, found.assigned.nodes))
            on = frozenset[str]().union(*held)
            return (
                all(len(nodes) == replicas for nodes in held)
                and list(found.ready) == held
                and len(on) == (nodes or len(on))
            )

        wait_until(are_ready, 3 * END_S, f"{collection} is in memory")
        # What this process knew of it is out of date by now.
        shown = self.cluster.shard_map
        wait_until(lambda: shown.shares(collection) is not None, END_S)


@contextmanager
def site_on(redis_url: str, directory: Path) -> Iterator[Site]:
    """A cluster whose collections have eight shards, each on one node; ``new_node`` says what is otherwise."""
    environ = {
        "CLUSTER_BROKER_URL": redis_url, "CLUSTER_DATA_DIR": str(directory / "data"), "CLUSTER_SHARDS": str(SHARDS),
    }  # fmt: skip

    def new_node(name: str, *, pool: str = "threads", slots: int = 2, replicas: int = 1, **more: str) -> WorkerProcess:
        own = {**environ, "CLUSTER_ROLES": "worker,cache", "CLUSTER_SHARD_REPLICAS": str(replicas), **more}
        return WorkerProcess(name, redis_url, directory, app="cluster_tasks", pool=pool, slots=slots, environ=own)

    with pytest.MonkeyPatch.context() as here, Celery("sender", set_as_current=False) as app:
        for name, value in environ.items():
            here.setenv(name, value)
        Cluster(app)
        yield Site(app, new_node)


class searching:  # noqa: N801 - used as a function
    """Searches on and on for the first documents, and notes what was wrong."""

    def __init__(self, site: Site) -> None:
        self._site, self._stop = site, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.done, self.wrong = 0, list[object]()

    def more(self, number: int) -> Callable[[], bool]:
        """A condition: so many more searches were done."""
        wanted = self.done + number
        return lambda: self.done >= wanted

    def __enter__(self) -> searching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        # Those that are there from the beginning.
        wanted = {each["id"] for each in DOCUMENTS}
        while not self._stop.is_set():
            try:
                found = self._site.ids("docs", "house", mode="text", k=COUNT)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the test is told
                self.wrong.append(exc)
            else:
                if set(found) != wanted or len(found) != len(wanted):
                    self.wrong.append(sorted(wanted ^ set(found)))
            self.done += 1
