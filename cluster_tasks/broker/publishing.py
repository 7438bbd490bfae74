"""A publish that is repeated, because its reply was lost, places its job once.

A producer numbers its publishes, and Redis keeps the number of its last one: a try that arrives after its repetition,
or after a later publish, changes nothing. So a producer has one publish under way at a time. Who publishes while others
do it, be it a thread, a greenlet or the handler of a signal within a publish, is another producer.

One whose publish has failed for good is not used again: nobody tells here whether Celery repeats that.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from typing import NamedTuple

PUBLISH_PROPERTY = "cluster_publish"
"""Where a message says on its way to the transport which publish it is; see Publish."""
REMEMBERED_S = 300
"""How long after a publish a repetition of it is known as one: longer than Celery's policy repeats it."""


class Publish(NamedTuple):
    """One publish, however often it is tried."""

    producer: str
    number: int


_done: deque[Publish] = deque()
"""The last publishes of the producers of this process that have none under way."""
_process = os.getpid()


def begin_publish() -> Publish:
    """Number a publish of a producer that has none under way."""
    global _process
    if _process != os.getpid():
        # A forked child is a copy, and has producers of its own. uWSGI forks without the hooks of Python.
        _done.clear()
        _process = os.getpid()
    try:
        producer, number = _done.pop()
    except IndexError:
        producer, number = secrets.token_hex(8), 0
    return Publish(producer, number + 1)


def end_publish(publish: Publish) -> None:
    """A publish was done, and will not be repeated."""
    _done.append(publish)
