"""The app of the scenarios, on nodes that write down each success, by Celery's signal."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from celery import signals

from cluster_tasks import ClusterTask
from tests.process.jobs import Jobs, make_jobs, note

BACKTRACKS = re.compile(r"(a+)+b")


@dataclass(frozen=True)
class ChaosJobs(Jobs):
    """Beside those of the other tests: tasks for chords, limits and busy processors."""

    gather: Any
    throttled: Any
    burn: Any
    match: Any


def make_chaos_jobs() -> ChaosJobs:
    """Return a new app."""
    made = make_jobs()
    app = made.app

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.gather", request_type="llm")
    def gather(self: Any, parts: list[str]) -> int:
        """The body of a chord; return how many parts it had."""
        note(f"started:{self.request.id}", self.request.hostname)
        return len(parts)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.throttled", request_type="llm", rate_limit="10/s")
    def throttled(self: Any, seconds: float = 0.0) -> str:
        """A task of which a node begins ten a second."""
        note(f"started:{self.request.id}", self.request.hostname)
        time.sleep(seconds)
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.burn", request_type="llm")
    def burn(self: Any, seconds: float) -> str:
        """Keep a processor busy."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            sum(range(1000))
        return str(self.request.hostname)

    @app.task(base=ClusterTask, bind=True, shared=False, name="jobs.match", request_type="llm")
    def match(self: Any, length: int) -> bool:
        """Match a regular expression that backtracks: each more in length doubles the time, and the GIL is held."""
        note(f"started:{self.request.id}", self.request.hostname)
        return bool(BACKTRACKS.match("a" * length))

    kept = {name: getattr(made, name) for name in Jobs.__dataclass_fields__}
    return ChaosJobs(**kept, gather=gather, throttled=throttled, burn=burn, match=match)


def audit() -> None:
    """Write down each success."""
    # Weakly held, as signals hold by default, it would be gone at once.
    signals.task_success.connect(_succeeded, weak=False)


def _succeeded(sender: Any, **_: Any) -> None:
    note("succeeded", sender.request.id)
