"""Tasks that the cluster sends to its coordinators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from celery import Celery

CHECK_HEALTH = "cluster.check_health"
REBALANCE = "cluster.rebalance"
OPTIMIZE = "cluster.optimize"


def register_control_tasks(app: Celery, duties: Mapping[str, Callable[[], object]]) -> None:
    """Make the control tasks known to ``app``, each by its name."""
    for name, duty in duties.items():
        _register(app, name, duty)


def _register(app: Celery, name: str, duty: Callable[[], object]) -> None:
    # Not shared: Celery would give this app's check to every other app of the process.
    # Without events: two checks a second would push people's jobs out of what Flower keeps.
    @app.task(name=name, ignore_result=True, send_events=False, shared=False)  # type: ignore[untyped-decorator]
    def control() -> None:
        duty()
