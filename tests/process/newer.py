"""The app of the tests as of the next release: it has a task more."""

from __future__ import annotations

from typing import Any

from cluster_tasks import ClusterTask
from tests.process.jobs import Jobs, make_jobs


def make_newer() -> Jobs:
    """Return a new app."""
    made = make_jobs()

    @made.app.task(base=ClusterTask, bind=True, shared=False, name="jobs.newest", request_type="llm")
    def newest(self: Any) -> str:
        """A task that the release before does not know."""
        return str(self.request.hostname)

    return made


app = make_newer().app
