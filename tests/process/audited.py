"""The app of the tests on nodes that write down each end of a job, by Celery's signals and not by what commits."""

from __future__ import annotations

from typing import Any

from celery import signals

from tests.process.jobs import app, note

__all__ = ["app"]


@signals.task_success.connect
def _succeeded(sender: Any, **_: Any) -> None:
    note("succeeded", sender.request.id)


@signals.task_failure.connect
def _failed(task_id: str, **_: Any) -> None:
    note("failed", task_id)
