"""The app of the tests, and what is told of the failure of a chord: then Redis refuses to store it, the first time."""

from __future__ import annotations

import os
import threading
from typing import Any

import redis

from tests.process.jobs import make_jobs, note

app = make_jobs().app


@app.task(name="jobs.refuse", shared=False)
def refuse(request: Any, exc: Any, traceback: Any) -> None:
    """Let Redis refuse all writes for a second."""
    if len(note("refused", "")) > 1:
        return
    with redis.Redis.from_url(os.environ["CLUSTER_BROKER_URL"]) as client:
        client.config_set("maxmemory", "1")
    threading.Timer(1.0, allow).start()


def allow() -> None:
    """Let it take them again."""
    with redis.Redis.from_url(os.environ["CLUSTER_BROKER_URL"]) as client:
        client.config_set("maxmemory", "0")
