"""An app as users have it: its tasks, and one line that makes its workers a cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from cluster_tasks import Cluster, ClusterTask


@dataclass(frozen=True)
class Jobs:
    """The app, its cluster and its tasks."""

    app: Celery
    cluster: Cluster
    work: Any
    patient: Any
    flaky: Any
    plain: Any
    hog: Any
    fatal: Any
    once: Any
    silent: Any
    huge: Any
    limited: Any
    leave: Any
    frail: Any
    stubborn: Any
    stubborn_once: Any
    verbose: Any
    verbatim: Any
    wordy: Any


def make_jobs() -> Jobs:
    """Return a new app; workers make one when they import this module, each test makes its own."""
    app = Celery("jobs", set_as_current=False)
    cluster = Cluster(app)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.work", request_type="llm", affinity="key")
    def work(self: Any, seconds: float = 0.0, key: str = "") -> str:
        """Take some time; return the node that did it. Every start is noted, so that tests can count them."""
        note(f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.patient", request_type="llm", affinity="key")
    def patient(self: Any, key: str = "") -> str:
        """Run until the test lets it go, see ``let_go``; return the node that did it."""
        return run_until_let_go(self)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.flaky", request_type="llm", max_retries=3)
    def flaky(self: Any, failures: int) -> str:
        """Fail so many times, then succeed; return the nodes that tried."""
        tried = note(f"tried:{self.request.id}", self.request.hostname)
        if len(tried) <= failures:
            raise self.retry(countdown=0)
        return ",".join(tried)

    @app.task(name="jobs.plain", shared=False)
    def plain(number: int) -> int:
        """A task that is none of the cluster's."""
        return number + 1

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.hog", request_type="llm")
    def hog(self: Any, seconds: int) -> str:
        """Hold the GIL, as a regular expression that backtracks does: no other thread of the process runs."""
        note(f"started:{self.request.id}", self.request.hostname)
        # PyDLL, unlike CDLL, does not let go of the GIL for a call.
        ctypes.PyDLL(None).sleep(seconds)
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.fatal", request_type="llm")
    def fatal(self: Any, times: int = 1_000_000, name: str = "") -> str:
        """Kill the process that runs it, so many times; then return the node. Jobs of one name are counted as one."""
        if len(note(f"started:{name or self.request.id}", self.request.hostname)) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.once", request_type="llm", rerun_on_crash=False)
    def once(self: Any, name: str = "") -> None:
        """Kill the process that runs it; must not be run twice. Jobs of one name are counted as one."""
        note(f"started:{name or self.request.id}", str(self.request.hostname))
        os.kill(os.getpid(), signal.SIGKILL)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.silent", request_type="llm", ignore_result=True)
    def silent(self: Any, seconds: float = 0.0) -> None:
        """Take some time, and give no result."""
        note(f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.huge", request_type="llm")
    def huge(self: Any) -> None:
        """Ask for more memory than there is."""
        raise MemoryError(f"on {self.request.hostname}")

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.limited", request_type="llm", rate_limit="1/m")
    def limited(self: Any) -> str:
        """A task of which a node begins one a minute."""
        note(f"started:{self.request.id}", self.request.hostname)
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.leave", request_type="llm")
    def leave(self: Any) -> None:
        """Exit, as a library does that was written for the command line."""
        note(f"started:{self.request.id}", self.request.hostname)
        raise SystemExit(3)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.frail", request_type="llm")
    def frail(self: Any, seconds: float) -> str:
        """Take some time; as the file of ``TEST_ILLNESS`` of its node says, raise an error at once, or take longer."""
        file = Path(os.environ["TEST_ILLNESS"])
        illness = file.read_text() if file.exists() else ""
        if illness == "fails":
            raise RuntimeError(f"{self.request.hostname} is ill")
        time.sleep(seconds * (int(illness) if illness else 1))
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.verbose", request_type="llm")
    def verbose(self: Any, characters: int, seconds: float) -> None:
        """Take some time, and fail with an error of so many characters."""
        note(f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        raise ValueError("x" * characters)

    @app.task(base=ClusterTask, shared=False, name="jobs.verbatim", request_type="llm")
    def verbatim(value: Any) -> Any:
        """Return what is given."""
        return value

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.wordy", request_type="llm")
    def wordy(self: Any, characters: int) -> str:
        """Return so many characters."""
        note(f"started:{self.request.id}", self.request.hostname)
        return "x" * characters

    def take_long_the_first_time(self: Any, seconds: float = 600.0, then: float = 0.0) -> str:
        """Whoever runs it first does not come to its end in time."""
        time.sleep(seconds if len(note(f"started:{self.request.id}", self.request.hostname)) == 1 else then)
        return str(self.request.hostname)

    options: dict[str, Any] = {"base": ClusterTask, "bind": True, "shared": False, "request_type": "llm"}
    stubborn = app.task(name="jobs.stubborn", **options)(take_long_the_first_time)
    stubborn_once = app.task(name="jobs.stubborn_once", rerun_on_crash=False, **options)(take_long_the_first_time)

    return Jobs(
        app, cluster, work, patient, flaky, plain, hog, fatal, once, silent, huge, limited, leave, frail, stubborn,
        stubborn_once, verbose, verbatim, wordy,
    )  # fmt: skip


def notes() -> redis.Redis:
    """The Redis of what tasks note, which they reach by a way of its own where a test breaks that of the node."""
    return redis.Redis.from_url(os.environ.get("TEST_NOTES_URL") or os.environ["CLUSTER_BROKER_URL"])


def run_until_let_go(task: Any) -> str:
    """Note that the job of a task has started, and wait until the test lets it go; return the node."""
    note(f"started:{task.request.id}", task.request.hostname)
    with notes() as client:
        while not client.exists(f"test:go:{task.request.id}"):
            time.sleep(0.02)
    return str(task.request.hostname)


def note(key: str, value: str) -> list[str]:
    """Append to a list in Redis beside the cluster's keys; return all of it."""
    with notes() as client:
        client.rpush(f"test:{key}", value)
        listed: Any = client.lrange(f"test:{key}", 0, -1)
        return [item.decode() for item in listed]


app = make_jobs().app
