"""Tasks whose jobs are submitted many at a time, on nodes that note what they do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.exceptions import Reject

from cluster_tasks import Cluster, ClusterTask
from tests.process.jobs import note

POISON, BAD = "poison", "bad"


@dataclass(frozen=True)
class Batches:
    """The app, its cluster and its tasks."""

    app: Celery
    cluster: Cluster
    work: Any
    double: Any
    flaky: Any
    slow: Any
    brief: Any
    turned: Any
    replaced: Any
    triple: Any
    patient: Any


def double_together(app: Celery, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Double all words at once. A bad one fails, one that is poison kills the process."""
    words = [call["word"] for call in calls]
    note("together", str(len(words)))
    if POISON in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "breaks all" in words:
        raise RuntimeError("none of them can be done")
    time.sleep(max(float(call.get("seconds", 0.0)) for call in calls))
    kinds = {BAD: ValueError(BAD), "unsayable": object()}
    return [kinds.get(word, 2 * word) for word in words]


def triple_together(app: Celery, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Triple all words at once. Words may fail, fail for a while, kill the process, or break the call."""
    words = [call["word"] for call in calls]
    note("together", ",".join(words))
    if POISON in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "breaks all" in words:
        raise RuntimeError("none of them can be done")
    time.sleep(max(float(call.get("seconds", 0.0)) for call in calls))
    kinds = {BAD: ValueError(BAD), "unsayable": object(), "later": ConnectionError("not yet")}
    return [kinds.get(word, 3 * word) for word in words]


def make_batches() -> Batches:
    """Return a new app."""
    app = Celery("batches", set_as_current=False)
    cluster = Cluster(app)
    app.conf.result_extended = bool(os.environ.get("TEST_EXTENDED"))
    options: dict[str, Any] = {"base": ClusterTask, "bind": True, "shared": False, "request_type": "llm"}

    @app.task(name="batches.work", **options)
    def work(self: Any, word: str, seconds: float = 0.0) -> str:
        """Return the word and the node; fail for a bad one."""
        note(f"started:{self.request.id}", self.request.hostname)
        if word == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(seconds)
        if word == BAD:
            raise ValueError(word)
        return f"{word} {self.request.hostname}"

    @app.task(name="batches.double", together=double_together, **options)
    def double(self: Any, word: str, seconds: float = 0.0) -> str:
        """What ``double_together`` does, for one word."""
        note(f"started:{self.request.id}", self.request.hostname)
        if word == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "breaks all":
            raise RuntimeError("this one cannot be done")
        return 2 * word

    @app.task(name="batches.flaky", max_retries=3, **options)
    def flaky(self: Any, failures: int) -> int:
        """Fail so many times, then return how often it was tried."""
        tried = len(note(f"tried:{self.request.id}", self.request.hostname))
        if tried <= failures:
            raise self.retry(countdown=0)
        return tried

    @app.task(name="batches.slow", **options)
    def slow(self: Any, seconds: float) -> str:
        """Take some time; return the node."""
        note(f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        return str(self.request.hostname)

    @app.task(name="batches.brief", time_limit=2, **options)
    def brief(self: Any, seconds: float) -> str:
        """Take no longer than two seconds."""
        time.sleep(seconds)
        return str(self.request.hostname)

    @app.task(name="batches.turned", **options)
    def turned(self: Any, times: int) -> int:
        """Reject the message so many times, to be given it again; then return how often it was tried."""
        tried = len(note(f"tried:{self.request.id}", self.request.hostname))
        if tried <= times:
            raise Reject("not now", requeue=True)
        if times < 0:
            raise Reject("never", requeue=False)
        return tried

    @app.task(name="batches.replaced", **options)
    def replaced(self: Any, word: str) -> Any:
        """What another task makes of it."""
        return self.replace(work.s(word))

    def done_together(name: str, **more: Any) -> Any:
        def alone(self: Any, word: str, failures: int = 0, seconds: float = 0.0) -> str:
            note(f"started:{self.request.id}", self.request.hostname)
            if word == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "breaks all":
                raise RuntimeError("this one cannot be done")
            if word == "endless":
                time.sleep(600)
            return 3 * word

        return app.task(name=name, together=triple_together, max_retries=2, **{**options, **more})(alone)

    @app.task(name="batches.joined", **options)
    def joined(self: Any, words: list[str]) -> str:
        """What a chord of words makes."""
        return "".join(words)

    triple = done_together("batches.triple", batch=8, autoretry_for=(ConnectionError,), retry_backoff=False,
                           default_retry_delay=0)  # fmt: skip
    patient = done_together("batches.patient", batch=8, batch_wait_s=1.0)

    return Batches(app, cluster, work, double, flaky, slow, brief, turned, replaced, triple, patient)


app = make_batches().app
