"""What a node counts of its jobs, for the metrics of the cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cluster_tasks.broker.message import SENT_AT_PROPERTY
from cluster_tasks.keys import ANY_TYPE
from cluster_tasks.metrics.counts import Counts

LONGEST_WAIT_S = 30 * 24 * 3600.0
"""Nothing longer is believed: a sum must not be spoilt by one message."""
counts = Counts()
"""Of this process: Celery builds its requests itself, so they have to find it by name."""


def type_of(task: Any) -> str:
    """The request type of a task; a task that declares none is run by every node."""
    return str(getattr(task, "request_type", ANY_TYPE))


def waited_s(properties: Mapping[str, Any], due: datetime | None, started_s: float) -> float | None:
    """How long a job has waited that started at ``started_s`` of the monotonic clock; None: nobody knows.

    It waits from when it was sent or, if that is later, ``due``. Clocks of hosts differ: no wait is less than nothing.
    """
    sent_at = properties.get(SENT_AT_PROPERTY)
    # In a message from anywhere it may be anything.
    if not isinstance(sent_at, float):
        return None
    since = sent_at if due is None else max(sent_at, due.timestamp())
    waited = time.time() - since - (time.monotonic() - started_s)
    return min(max(0.0, waited), LONGEST_WAIT_S)
