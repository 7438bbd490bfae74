"""The ready-made app with nodes that keep a record of all they do: ``celery -A workers.audit worker``.

Celery's signals write it, so it is no work of the code that fetches and commits: a result that was refused sends no
signal of success. The demo counts by it; no other worker loads this module.
"""

from __future__ import annotations

from typing import Any

from celery import Task, signals

from cluster_tasks.app import app, cluster
from cluster_tasks.tasks.base import ClusterTask
from workers.demo.record import COMMITTED, EXECUTED, Record

__all__ = ["app"]


def _executed(task_id: str, task: Task, **_: Any) -> None:
    _note(EXECUTED, task_id, task)


def _succeeded(sender: Task, **_: Any) -> None:
    _note(COMMITTED, sender.request.id, sender)


def _failed(sender: Task, task_id: str, **_: Any) -> None:
    _note(COMMITTED, task_id, sender)


def _note(kind: str, job_id: str, task: Task) -> None:
    # The control tasks of the cluster are no jobs.
    if isinstance(task, ClusterTask):
        attempt = f"{task.name}#{task.request.retries}"
        Record(cluster.client, cluster.keys).note(kind, job_id, attempt, task.request.hostname or "")


signals.task_prerun.connect(_executed)
signals.task_success.connect(_succeeded)
signals.task_failure.connect(_failed)
