"""Messages that cannot be run: for other nodes to run, else ended as failed, so that whoever waits learns of it.

What has no id, and so nobody who waits, is kept for inspection. Whatever a message holds, it ends no worker.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.worker import state

from cluster_tasks.broker import deliveries
from cluster_tasks.broker.headers import check_job
from cluster_tasks.broker.message import Delivery, request_type_of
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import EndNotStored, StaleCommit, UnavailableError
from cluster_tasks.keys import BOUND

logger = logging.getLogger(__name__)


class Refusals:
    """What a consumer does with such messages of the cluster's lists; those of other queues are Celery's."""

    def __init__(self, consumer: Any, cluster: Cluster) -> None:
        self._consumer, self._cluster = consumer, cluster
        self._stock = {
            name: getattr(consumer, name)
            for name in (
                "on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error", "create_task_handler",
            )
        }  # fmt: skip
        consumer.on_unknown_message = self.nameless
        consumer.create_task_handler = self.handler
        consumer.on_unknown_task = self.unknown
        consumer.on_invalid_task = self.invalid
        consumer.on_decode_error = self.undecodable

    def handler(self) -> Callable[[Any], None]:
        """Celery's own, which lets many an error of a message end the worker: here it ends the message."""
        handle = self._stock["create_task_handler"]()
        passing = (*self._consumer.connection_errors, *self._consumer.channel_errors, UnavailableError)

        def on_task_received(message: Any) -> None:
            try:
                if "task" in message.headers:
                    check_job(message.headers, message.payload)
                handle(message)
            except passing:
                raise
            except Exception as exc:  # noqa: BLE001 - what a stranger's message raises cannot be foreseen
                for request in [held for held in state.reserved_requests if held.message is message]:
                    state.task_ready(request)
                if not message.acknowledged:
                    self.invalid(None, message, exc)

        return on_task_received

    def nameless(self, body: Any, message: Any) -> None:
        """Keep a message that names no task."""
        if Delivery.of(message.properties) is None:
            self._stock["on_unknown_message"](body, message)
            return
        self._fail(message, InvalidTaskError("it names no task"))

    def unknown(self, body: Any, message: Any, exc: Exception) -> None:
        """Hand a job to a node that knows its task, as new code does while the old still runs."""
        node, delivery = deliveries.current(), Delivery.of(message.properties)
        if node is None or delivery is None:
            self._stock["on_unknown_task"](body, message, exc)
            return
        name = message.headers["task"]
        try:
            knowing = self._cluster.epochs.knowing(name, request_type_of(message.properties))
        except UnavailableError as unavailable:
            logger.warning("a job of the unknown task %s waits: %s", name, unavailable)
            node.let_lie(delivery.tag)
            return
        others = [node_id for node_id in knowing if node_id != delivery.node_id]
        if others:
            chosen = random.choice(others)
            logger.info("%s is not known here: job %s goes to %s", name, message.headers.get("id"), chosen)
            node.requeue(delivery.tag, self._cluster.keys.node_queue(chosen) + BOUND)
            return
        self._fail(message, NotRegistered(name))
        signals.task_unknown.send(
            sender=self._consumer, message=message, exc=exc, name=name, id=message.headers.get("id")
        )

    def invalid(self, body: Any, message: Any, exc: Exception) -> None:
        """End a job whose message is not as it must be."""
        if Delivery.of(message.properties) is None:
            self._stock["on_invalid_task"](body, message, exc)
            return
        self._fail(message, exc)
        signals.task_rejected.send(sender=self._consumer, message=message, exc=exc)

    def undecodable(self, message: Any, exc: Exception) -> None:
        """End a job whose arguments cannot be read."""
        if Delivery.of(message.properties) is None:
            self._stock["on_decode_error"](message, exc)
            return
        self._fail(message, exc)

    def _fail(self, message: Any, exc: Exception) -> None:
        headers = message.headers
        logger.error("job %s of task %s cannot be run: %r", headers.get("id"), headers.get("task"), exc)
        if headers.get("id"):
            self.end_as_failed(message.delivery_tag, headers, message.properties, _embedded(message), exc)
        elif (node := deliveries.current()) is not None:
            node.set_aside(message.delivery_tag)
        message.reject_log_error(logger, self._consumer.connection_errors)

    def end_as_failed(
        self, tag: str, headers: dict[str, Any], properties: dict[str, Any], embedded: dict[str, Any], exc: Exception
    ) -> None:
        """End the job of a delivery that is not run, and tell what follows it by ``embedded``, its callbacks.

        The delivery is let go of by the caller. What cannot be told is set aside.
        """
        told = {"properties": properties, "delivery_info": properties.get("delivery_info") or {}}
        job_id, node = headers["id"], deliveries.current()
        try:
            self._cluster.app.backend.mark_as_failure(job_id, exc, request=Context({**headers, **embedded, **told}))
        except StaleCommit as stale:
            logger.warning("%s", stale)
        except EndNotStored as unstored:
            logger.warning("%s", unstored)
            if node is not None:
                node.let_lie(tag)
            return
        except Exception:
            # Whatever else is wrong with it: no worker dies of a message, and people can look at it.
            logger.exception("job %s cannot even be failed, its message is set aside", job_id)
            if node is not None:
                node.set_aside(tag)
        if self._consumer.event_dispatcher:
            self._consumer.event_dispatcher.send("task-failed", uuid=job_id, exception=repr(exc))


def _embedded(message: Any) -> dict[str, Any]:
    """What a message says of its callbacks, if it can be read."""
    try:
        _, _, embedded = message.payload
        return dict(embedded)
    except Exception:  # noqa: BLE001 - whatever a broken body raises, its job has to end.
        return {}
