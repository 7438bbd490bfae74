"""The app of the tests with processes that die where one step of a job's end is done and the next is not."""

from __future__ import annotations

import os
import signal
from typing import Any

import redis
from celery import Celery, signals

from cluster_tasks import ClusterTask
from tests.process.jobs import Jobs, make_jobs, note

DEATHS = "test:deaths"
"""Hash of names: when a job of that name is published by a node, the process that does it dies, once."""
BREAK_OFF = {"TEST_BREAK_OFF": "1"}
"""Environment of nodes that do so."""


def add_tasks(app: Celery) -> None:
    """Add the tasks of this app."""

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.fail", request_type="llm")
    def fail(self: Any) -> None:
        """Fail."""
        raise ValueError("as it was told")

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.follow", request_type="llm")
    def follow(self: Any, *_: Any, name: str) -> int:
        """Come after something; return the fencing token."""
        note(f"followed:{name}", self.request.id)
        return int(self.fencing_token)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.again", request_type="llm", max_retries=5)
    def again(self: Any, *, name: str) -> int:
        """Succeed at the second attempt; return the fencing token."""
        note(f"{'followed' if self.request.retries else 'tried'}:{name}", self.request.id)
        if not self.request.retries:
            raise self.retry(countdown=0)
        return int(self.fencing_token)


def make_breaking_off() -> Jobs:
    """Return a new app."""
    made = make_jobs()
    add_tasks(made.app)
    return made


def _die(when: str, body: Any) -> None:
    name = body[1].get("name")
    if name and "TEST_BREAK_OFF" in os.environ:
        with redis.Redis.from_url(os.environ["CLUSTER_BROKER_URL"]) as client:
            if client.hget(DEATHS, name) == when.encode() and client.hdel(DEATHS, name):
                os.kill(os.getpid(), signal.SIGKILL)


@signals.before_task_publish.connect
def _before(body: Any, **_: Any) -> None:
    _die("before", body)


@signals.after_task_publish.connect
def _after(body: Any, **_: Any) -> None:
    _die("after", body)


app = make_breaking_off().app
