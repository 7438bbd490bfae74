"""The spans of the jobs that a process runs."""

from __future__ import annotations

import time
from typing import Any

from celery import Task, signals, states

from cluster_tasks import tracing
from cluster_tasks.broker.message import SENT_AT_PROPERTY, Delivery, due_time
from workers.counting import type_of

RUN = "_cluster_run"
"""Where a task's request keeps its span."""


def follow_jobs() -> None:
    """Make a span of each job of the cluster that runs in this process or a fork of it, if there are traces at all."""
    if tracing.IS_INSTALLED:
        signals.task_prerun.connect(_begin)
        signals.task_postrun.connect(_end)


def _begin(task: Task, task_id: str, **_: Any) -> None:
    request = task.request
    delivery = Delivery.of(request.properties)
    if delivery is None or not tracing.is_on():
        return
    facts = {
        "messaging.operation.type": "process",
        "messaging.message.id": task_id,
        "messaging.destination.name": str((request.delivery_info or {}).get("routing_key")),
        "cluster.node": delivery.node_id,
        "cluster.request_type": type_of(task),
        "cluster.retries": request.retries or 0,
        "cluster.redelivered": bool((request.delivery_info or {}).get("redelivered")),
    }
    setattr(request, RUN, tracing.spans.begin_run(task.name, vars(request), facts, _waited(task)))


def _waited(task: Task) -> tuple[float, float] | None:
    """From when till when a job has waited, in seconds since 1970; None: not known, or clocks differ too much."""
    sent_at, now = task.request.properties.get(SENT_AT_PROPERTY), time.time()
    if not isinstance(sent_at, float):
        return None
    since = max(sent_at, due_time({"headers": {"eta": task.request.eta}}) or 0.0)
    return (since, now) if 0 < since <= now else None


def _end(task: Task, retval: Any, state: str | None, **_: Any) -> None:
    run = getattr(task.request, RUN, None)
    if run is not None:
        failed = state == states.FAILURE and isinstance(retval, BaseException)
        tracing.spans.end_run(run, state or "", retval if failed else None)
