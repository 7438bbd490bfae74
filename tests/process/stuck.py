"""The app under test, with ways to break the worker that runs it."""

from __future__ import annotations

import time
from typing import Any

from celery import signals
from celery.worker.control import control_command

from tests.process.jobs import make_jobs

app = make_jobs().app
HOLDS_UP = "holds-up-the-loop"
"""The id of a job whose message the event loop never gets done with."""


@signals.task_received.connect
def never_get_done(request: Any, **_: Any) -> None:
    """Block the event loop."""
    if request.id == HOLDS_UP:
        time.sleep(600)


@control_command()
def stop_fetching(state: Any, **_: Any) -> None:
    """Let the event loop go on without the consumer, as after a reconnect that went wrong."""
    channel = state.consumer.task_consumer.channel
    channel.connection.cycle._channels.discard(channel)
