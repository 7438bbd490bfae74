"""The app under test, whose workers die of three messages before they begin to run them."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery import signals
from kombu import compression
from kombu.serialization import register

from tests.process.jobs import Jobs, make_jobs

BRITTLE = "brittle"
"""A serializer whose reader a text kills, as a bug in a decoder that is written in C does."""
DENSE = "dense"
"""A compression that the same text kills, as a body does that takes more memory than there is."""
DEADLY = "deadly"
"""That text, and the id of a job that kills who is told that it has come."""


def _die_of_it() -> None:
    if os.environ.get("TEST_DIES"):
        os.kill(os.getpid(), signal.SIGKILL)


def _read(body: Any) -> Any:
    text = body if isinstance(body, str) else bytes(body).decode()
    if DEADLY in text:
        _die_of_it()
    return json.loads(text)


def _unpack(body: bytes) -> bytes:
    if DEADLY.encode() in body:
        _die_of_it()
    return body


@signals.task_received.connect
def _hear_of(request: Any, **_: Any) -> None:
    if request.id == DEADLY:
        _die_of_it()


def make_poisonous() -> Jobs:
    """Return a new app."""
    register(BRITTLE, json.dumps, _read, content_type="application/x-brittle", content_encoding="utf-8")
    compression.register(bytes, _unpack, "application/x-dense", aliases=[DENSE])
    made = make_jobs()
    made.app.conf.accept_content = ["json", BRITTLE]
    return made


app = make_poisonous().app
