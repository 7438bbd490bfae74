"""How the ready-made jobs are declared, and what they work with."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import Celery, shared_task
from celery.local import Proxy

from cluster_tasks.errors import (
    BeingSplit,
    CollectionMismatch,
    CollectionNotFound,
    ConfigurationError,
    InvalidArguments,
    ProviderLimited,
)
from cluster_tasks.tasks.apps import Configured, cluster_of, sending_app
from cluster_tasks.tasks.base import ClusterTask

if TYPE_CHECKING:
    from cluster_tasks.gateway.fallbacks import ChatGateway
    from cluster_tasks.gateway.rankings import RerankGateway
    from cluster_tasks.providers import EmbeddingProvider
    from cluster_tasks.shards.store import CollectionStore
    from cluster_tasks.shards.vector_store import VectorStore


EXPECTED = (CollectionMismatch, CollectionNotFound, InvalidArguments)
"""What a caller may have to do with: nothing that a node should log as its own error."""
SPLIT_WAIT_S, SPLIT_TRIES = 0.5, 600
"""So long a job that writes waits in its slot for the end of a split; and so often it comes back for it."""
SPREAD_S, WIDEST_SPREAD_S = 5.0, 60.0
"""Jobs that wait for room under a limit come back spread over so many seconds, and over more each time."""


def ready_made(name: str, **options: Any) -> Callable[[Callable[..., Any]], ClusterTask]:
    """Declare a job that every app of the process knows; its function gets the task as first argument.

    What stands for it in this process is the task of the app that ``sending_app`` names. A job whose provider has no
    room under its limits is sent again for the time when there is; one that is to write to a collection while that is
    split, some seconds later.
    """

    def declare(function: Callable[..., Any]) -> ClusterTask:
        shared_task(name=name, bind=True, base=ClusterTask, max_retries=None, throws=EXPECTED, **options)(
            _patient(function)
        )
        task: ClusterTask = Proxy(lambda: sending_app().tasks[name], name=function.__name__, __doc__=function.__doc__)
        return task

    return declare


def _patient(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(task: ClusterTask, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(task, *args, **kwargs)
        except ProviderLimited as exc:
            if task.request.is_eager:  # There is no later: it would be run again at once.
                raise
            # All that are turned away at once would come back at once, and be turned away again.
            spread_s = min(SPREAD_S * (1 + task.request.retries), WIDEST_SPREAD_S)
            raise task.retry(exc=exc, countdown=exc.retry_after_s + random.uniform(0, spread_s)) from None
        except BeingSplit as exc:
            if task.request.is_eager or task.request.retries > SPLIT_TRIES:
                raise
            # To wait in a slot would keep searches, which go on meanwhile, from it.
            raise task.retry(exc=exc, countdown=random.uniform(1, 3)) from None

    return run


class Backends:
    """The providers and the store of one app, each made at its first use in this process, and kept.

    All may be shared between threads and carried across a fork. They are imported here, because numpy, LanceDB and
    the OpenAI SDK would cost a process that only sends jobs more than a second.
    """

    def __init__(self, cluster: Configured) -> None:
        self._settings, self._cluster = cluster.settings, cluster

    @cached_property
    def chat(self) -> ChatGateway:
        """The language models. Raises ConfigurationError."""
        from cluster_tasks.gateway.fallbacks import chat_gateway

        return chat_gateway(self._settings, self._cluster.neighbourhood)

    @cached_property
    def embeddings(self) -> EmbeddingProvider:
        """The embedding model. Raises ConfigurationError."""
        from cluster_tasks.gateway.fallbacks import embedding_gateway

        return embedding_gateway(self._settings, self._cluster.neighbourhood)

    @cached_property
    def reranker(self) -> RerankGateway:
        """Who ranks what was found. Raises ConfigurationError."""
        from cluster_tasks.gateway.rankings import rerank_gateway

        return rerank_gateway(self._settings, self._cluster.neighbourhood)

    @cached_property
    def store(self) -> VectorStore:
        """The collections. Raises ConfigurationError if what they are kept in is not installed."""
        url = self._settings.vector_url
        if url is None:
            return self.sharded
        from cluster_tasks.shards.qdrant import open_store

        return open_store(url.get_secret_value())

    @cached_property
    def sharded(self) -> CollectionStore:
        """The collections, where their shards are ours. Raises ConfigurationError as ``store`` does and otherwise."""
        self.check_sharded()
        from cluster_tasks.shards.store import CollectionStore

        return CollectionStore(
            self._settings.data_dir, self._settings.shards, self._cluster.locks, writers_wait_s=SPLIT_WAIT_S
        )

    def check_sharded(self) -> None:
        """Raise ConfigurationError if an outside engine has the collections, and with them their shards."""
        if url := self._settings.vector_url:
            raise ConfigurationError(
                f"the collections are in an outside engine, {url}, which divides, places and copies them by itself: "
                "their shards are its own matter"
            )


_backends: WeakKeyDictionary[Celery, Backends] = WeakKeyDictionary()


def backends_of(app: Celery) -> Backends:
    """Return what the jobs of ``app`` work with. Raises ClusterError if it is in no cluster."""
    return _backends.setdefault(app, Backends(cluster_of(app)))
