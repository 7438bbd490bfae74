"""The ready-made Celery app: ``celery -A cluster_tasks worker`` starts a node of it."""

from __future__ import annotations

from importlib.util import find_spec

from celery import Celery
from celery.utils.imports import cwd_in_path

from cluster_tasks.cluster import Cluster

JOBS = ("embedding", "llm", "rag", "retrieval")

app = Celery("cluster_tasks", set_as_current=False, include=[f"cluster_tasks.tasks.{name}" for name in JOBS])
app.add_defaults({"worker_send_task_events": True, "task_send_sent_event": True})
# Of the current folder, which is not on the path of a program that is installed. Celery imports it from there.
with cwd_in_path():
    is_configured = find_spec("celeryconfig") is not None
if is_configured:
    app.config_from_object("celeryconfig")
cluster = Cluster(app)
