"""Tasks that the cluster sends to its coordinators."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

CHECK_HEALTH = "cluster.check_health"


def register_control_tasks(app: Celery, check_health: Callable[[], None]) -> None:
    """Make the control tasks known to ``app``."""

    # Not shared: Celery would give this app's check to every other app of the process.
    # Without events: two checks a second would push people's jobs out of what Flower keeps.
    @app.task(name=CHECK_HEALTH, ignore_result=True, send_events=False, shared=False)  # type: ignore[untyped-decorator]
    def check() -> None:
        check_health()
