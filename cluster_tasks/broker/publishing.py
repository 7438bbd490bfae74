"""A publish that is repeated, because its reply was lost, places its job once.

Every thread that publishes numbers its publishes, and Redis keeps the number of its last one. A command that was given
up may still be on its way when a later publish has been done: it comes too late, and changes nothing.
"""

from __future__ import annotations

import os
import secrets
import threading
from typing import NamedTuple

PUBLISH_PROPERTY = "cluster_publish"
"""Where a message says on its way to the transport which publish it is; see Publish."""
REMEMBERED_S = 300
"""How long after a publish a repetition of it is known as one: longer than Celery's policy repeats it."""


class Publish(NamedTuple):
    """One publish, however often it is tried."""

    producer: str
    """The thread."""
    number: int


class _Numbers(threading.local):
    # A forked child is a copy of its parent's thread and another producer.
    pid = 0
    producer = ""
    last = 0


_numbers = _Numbers()


def next_publish() -> Publish:
    """Number a publish of this thread."""
    if _numbers.pid != os.getpid():
        _numbers.pid, _numbers.producer, _numbers.last = os.getpid(), secrets.token_hex(8), 0
    _numbers.last += 1
    return Publish(_numbers.producer, _numbers.last)
