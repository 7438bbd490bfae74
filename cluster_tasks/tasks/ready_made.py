"""How the ready-made jobs are declared, and what they work with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import Celery, shared_task
from celery.local import Proxy

from cluster_tasks.settings import ClusterSettings
from cluster_tasks.tasks.apps import cluster_of, sending_app
from cluster_tasks.tasks.base import ClusterTask

if TYPE_CHECKING:
    from cluster_tasks.providers import ChatProvider, EmbeddingProvider
    from cluster_tasks.shards.store import CollectionStore


def ready_made(name: str, **options: Any) -> Callable[[Callable[..., Any]], ClusterTask]:
    """Declare a job that every app of the process knows; its function gets the task as first argument.

    What stands for it in this process is the task of the app that ``sending_app`` names.
    """

    def declare(function: Callable[..., Any]) -> ClusterTask:
        shared_task(name=name, bind=True, base=ClusterTask, **options)(function)
        task: ClusterTask = Proxy(lambda: sending_app().tasks[name], name=function.__name__, __doc__=function.__doc__)
        return task

    return declare


class Backends:
    """The providers and the store of one app, each made at its first use in this process, and kept.

    All may be shared between threads and carried across a fork. They are imported here, because numpy, LanceDB and
    the OpenAI SDK would cost a process that only sends jobs more than a second.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings

    @cached_property
    def chat(self) -> ChatProvider:
        """The language model. Raises ConfigurationError."""
        from cluster_tasks.providers import chat_provider

        return chat_provider(self._settings)

    @cached_property
    def embeddings(self) -> EmbeddingProvider:
        """The embedding model. Raises ConfigurationError."""
        from cluster_tasks.providers import embedding_provider

        return embedding_provider(self._settings)

    @cached_property
    def store(self) -> CollectionStore:
        """The collections. Raises ConfigurationError if LanceDB is not installed."""
        from cluster_tasks.shards.store import CollectionStore

        return CollectionStore(self._settings.data_dir)


_backends: WeakKeyDictionary[Celery, Backends] = WeakKeyDictionary()


def backends_of(app: Celery) -> Backends:
    """Return what the jobs of ``app`` work with. Raises ClusterError if it is in no cluster."""
    return _backends.setdefault(app, Backends(cluster_of(app).settings))
