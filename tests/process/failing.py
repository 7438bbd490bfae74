"""The app under test, on workers whose main process comes to grief when it is told to."""

from __future__ import annotations

import signal
from typing import Any

from celery import signals

from tests.process.jobs import app

__all__ = ["app"]


def _come_to_grief(*_: Any) -> None:
    raise RuntimeError("as a bug in the consumer")


@signals.worker_ready.connect
def _install(**_: Any) -> None:
    signal.signal(signal.SIGUSR2, _come_to_grief)
