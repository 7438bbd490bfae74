"""The app of the tests, with a task that is none of the cluster's and takes its time."""

from __future__ import annotations

from typing import Any

from tests.process.jobs import Jobs, make_jobs, run_until_let_go

PLAIN = "mixed.plain"


def make_mixed() -> Jobs:
    """Return a new app."""
    made = make_jobs()

    @made.app.task(bind=True, shared=False, name=PLAIN)
    def plain(self: Any) -> str:
        """Run until the test lets it go, see ``let_go``; return the worker that did it."""
        return run_until_let_go(self)

    return made


app = make_mixed().app
