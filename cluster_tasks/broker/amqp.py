"""How a Celery app comes to the cluster's transport: its connections, its queues, its routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import redis
from celery.app.amqp import AMQP, Queues
from kombu.connection import Connection, ConnectionPool, PooledConnection
from kombu.exceptions import OperationalError
from kombu.transport import redis as stock

from cluster_tasks import tracing
from cluster_tasks.broker.channel import ClusterSentinelTransport, ClusterTransport, check_queue
from cluster_tasks.broker.message import REQUEST_TYPE_PROPERTY, STRATEGY_PROPERTY
from cluster_tasks.broker.sequels import FOLLOWS_PROPERTY, announce
from cluster_tasks.errors import EndNotStored
from cluster_tasks.keys import DEFAULT_NAME, Keys

SEQUEL_POLICY = {"max_retries": 20, "interval_start": 0, "interval_step": 0.2, "interval_max": 1}
"""How what follows a job is published again: as often as Celery stores a result again."""
RECONNECT_S = 2.0
"""Longest wait between two attempts to reach Redis."""


class ClusterConnection(Connection):
    """A connection whose ``redis://`` means the transport of the cluster: URLs and Flower stay as they are."""

    def get_transport_cls(self) -> type[stock.Transport]:
        """The transport of the cluster for the URLs of Redis; Kombu's for all others."""
        if self.transport_cls in ("redis", "rediss", "redis+socket"):
            return ClusterTransport
        if self.transport_cls == "sentinel":
            return ClusterSentinelTransport
        return super().get_transport_cls()  # type: ignore[no-any-return]

    def _ensure_connection(
        self, errback: Any = None, max_retries: Any = None, interval_start: Any = 2, interval_step: Any = 2,
        interval_max: Any = 30, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # Kombu's own waits grow to half a minute: so long after an outage a worker would still do nothing.
        waits = (min(wait_s, RECONNECT_S) for wait_s in (interval_start, interval_step, interval_max))
        return super()._ensure_connection(errback, max_retries, *waits, *args, **kwargs)

    def Pool(self, limit: int | None = None, **options: Any) -> ConnectionPool:  # noqa: N802 - Kombu's name
        """A pool whose connections are of the cluster too."""
        return ClusterConnectionPool(self, limit, **options)


class PooledClusterConnection(PooledConnection, ClusterConnection):
    """Kombu's pools build connections of their own class; this one keeps our transport, after a failover too."""


class ClusterConnectionPool(ConnectionPool):
    """A pool of connections of the cluster."""

    def new(self) -> PooledClusterConnection:
        """A connection of the cluster, not connected yet."""
        return PooledClusterConnection(self, **dict(self.connection._info(resolve=False)))


class ClusterQueues(Queues):  # type: ignore[misc]
    """Celery's queues of an app. Who asks for their names, which is ``celery purge``, hears of the cluster's lists."""

    lists_of_the_cluster: Callable[[], Iterable[str]]
    """Their names, read from Redis."""

    def keys(self) -> Any:
        """The names of the app's queues and of the lists that the cluster has now. Asks Redis."""
        return {*super().keys(), *self.lists_of_the_cluster()}


def _facts(keys: Keys, message: Any, strategy: str, options: Mapping[str, Any]) -> tracing.Facts:
    """What the span of a publish tells of the router's choice."""
    queue = str(getattr(options["queue"], "name", options["queue"]))
    return {
        "messaging.operation.type": "send",
        "messaging.message.id": message.headers["id"],
        "messaging.destination.name": queue,
        "cluster.strategy": strategy,
        "cluster.node": keys.node_of(queue) or "",
        "cluster.request_type": str(options.get(REQUEST_TYPE_PROPERTY)),
    }


class ClusterAMQP(AMQP):  # type: ignore[misc]
    """Celery's messaging over connections of the cluster; the router comes first, before the app's own routes."""

    Connection = ClusterConnection
    cluster_route: Callable[..., dict[str, Any] | None]

    def _create_task_sender(self) -> Callable[..., Any]:
        send, app = super()._create_task_sender(), self.app
        keys = Keys(app.conf.broker_transport_options.get("cluster_name", DEFAULT_NAME))

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            strategy = options.pop(STRATEGY_PROPERTY, None)
            if queue := options.get("queue"):
                # Before Kombu declares it, which leaves a key of its own.
                check_queue(keys, getattr(queue, "name", queue))
            announce(app, message)
            if strategy is None:
                return send_once(producer, name, message, **options)
            facts, headers = _facts(keys, message, strategy, options), dict(options.get("headers") or {})
            with tracing.publishing(name, facts, headers):
                return send_once(producer, name, message, **{**options, "headers": headers})

        def send_once(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if FOLLOWS_PROPERTY not in message.properties:
                return send(producer, name, message, **options)
            # The work is done: it must not fail for an outage that its end can wait for.
            options["retry_policy"] = {**(options.get("retry_policy") or {}), **SEQUEL_POLICY}
            try:
                return send(producer, name, message, **{**options, "retry": True})
            except (OperationalError, redis.ConnectionError, redis.TimeoutError) as exc:
                raise EndNotStored(f"what follows a job could not be published: {exc}") from exc

        return send_task_message

    @property
    def routes(self) -> tuple[Any, ...]:
        """The cluster's route, and behind it those of the app."""
        return (self.cluster_route, *self.routes_of_the_app)

    @property
    def routes_of_the_app(self) -> tuple[Any, ...]:
        """Those that it would have without the cluster."""
        return tuple(super().routes)
