"""The ready-made Celery app: ``celery -A cluster_tasks worker`` starts a node of it."""

from __future__ import annotations

from typing import Any

from celery import Celery

from cluster_tasks.cluster import Cluster
from cluster_tasks.configuration import add_defaults, read_celeryconfig

JOBS = ("embedding", "llm", "rag", "retrieval")

app = Celery("cluster_tasks", set_as_current=False, include=[f"cluster_tasks.tasks.{name}" for name in JOBS])
read_celeryconfig(app)
cluster = Cluster(app)


def _send_events(**_: Any) -> None:
    # Flower's tables are made of them.
    add_defaults(app, {"worker_send_task_events": True, "task_send_sent_event": True})


app.on_after_configure.connect(_send_events)
