"""The app of these nodes. It imports nothing of the tests: containers get this file alone."""

from __future__ import annotations

import time
from typing import Any

from celery import Celery

from cluster_tasks import Cluster, ClusterTask


def make_app() -> Celery:
    """Return a new app; nodes make one when they import this module, each test makes its own."""
    app = Celery("jobs", set_as_current=False)
    cluster = Cluster(app)

    # Not shared: Celery would give them to every other app of this process. Its decorator has no types.
    @app.task(base=ClusterTask, bind=True, name="jobs.visit", request_type="visit", shared=False)  # type: ignore[untyped-decorator]
    def visit(self: Any, path: list[Any], gate: str = "") -> list[Any]:
        """Return ``path`` with this node at its end; not before the Redis key ``gate``, if one is named, exists."""
        while gate and not cluster.client.exists(gate):
            time.sleep(0.05)
        return [*path, self.request.hostname]

    @app.task(base=ClusterTask, name="jobs.refuse", request_type="visit", shared=False)  # type: ignore[untyped-decorator]
    def refuse(path: list[Any]) -> None:
        """Fail, whatever the path."""
        raise ValueError(f"refused after {len(path)} steps")

    return app


app = make_app()
