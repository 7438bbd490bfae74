"""The app of the tests, with a task that is none of the cluster's and takes its time."""

from __future__ import annotations

import time
from typing import Any

from tests.process.jobs import Jobs, make_jobs, note, notes

PLAIN = "mixed.plain"


def make_mixed() -> Jobs:
    """Return a new app."""
    made = make_jobs()

    @made.app.task(bind=True, shared=False, name=PLAIN)
    def plain(self: Any) -> str:
        """Run until the test lets it go, see ``let_go``; return the worker that did it."""
        note(f"started:{self.request.id}", self.request.hostname)
        with notes() as client:
            while not client.exists(f"test:go:{self.request.id}"):
                time.sleep(0.02)
        return str(self.request.hostname)

    return made


app = make_mixed().app
