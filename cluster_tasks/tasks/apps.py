"""Which Celery apps are in a cluster, and with which of them a ready-made job is sent."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

import redis
from celery import Celery, current_app
from kombu.utils.imports import symbol_by_name

from cluster_tasks.awaiting import Awaiting
from cluster_tasks.cache import Caches
from cluster_tasks.errors import ClusterError
from cluster_tasks.gateway.guard import Neighbourhood
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.shards.shard_map import ShardMap

READY_MADE_APP = "cluster_tasks.app:app"


class Configured(Protocol):
    """What a cluster is to its tasks."""

    @property
    def settings(self) -> ClusterSettings:
        """Raises ConfigurationError."""

    @property
    def keys(self) -> Keys:
        """Names of its keys. Raises ConfigurationError."""

    @property
    def client(self) -> redis.Redis:
        """A client of the broker's Redis. Raises ConfigurationError."""

    @property
    def awaiting(self) -> Awaiting:
        """Results for asyncio. Raises ConfigurationError."""

    @property
    def neighbourhood(self) -> Neighbourhood:
        """What providers share. Raises ConfigurationError."""

    @property
    def locks(self) -> Locks:
        """What must be done by one at a time. Raises ConfigurationError."""

    @property
    def shard_map(self) -> ShardMap:
        """Whom to ask for which shards. Raises ConfigurationError."""

    @property
    def caches(self) -> Caches:
        """What is kept. Raises ConfigurationError."""


_clusters: WeakKeyDictionary[Celery, Configured] = WeakKeyDictionary()


def join(app: Celery, cluster: Configured) -> None:
    """Note that ``app`` is in ``cluster``. Raises ClusterError if it is in one already."""
    if app in _clusters:
        raise ClusterError(f"the app {app.main!r} is in a cluster already: import the one that was made with it")
    _clusters[app] = cluster


def cluster_of(app: Celery) -> Configured:
    """Return the cluster of an app. Raises ClusterError if none was made for it."""
    try:
        return _clusters[app]
    except (KeyError, TypeError):  # A proxy that stands for no app cannot even be looked up.
        raise ClusterError(
            f"the app {getattr(app, 'main', app)!r} is in no cluster: add Cluster(app) where it is made"
        ) from None


def sending_app() -> Celery:
    """Return the current app if it is in a cluster, else the ready-made one.

    Celery knows a current app only in the thread that made it. In others, those of a web server for instance, the
    app in a cluster that was made last stands for it, unless it was made with ``set_as_current=False``.
    """
    app = current_app._get_current_object()
    if app in _clusters:
        return app
    users = [app for app in list(_clusters) if app.set_as_current]
    return users[-1] if users else symbol_by_name(READY_MADE_APP)
