"""The metrics of the cluster among those of Flower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from celery import Celery, signals
from prometheus_client import REGISTRY
from prometheus_client.registry import Collector


def show_in_flower(app: Celery, metrics: Callable[[], Collector]) -> None:
    """Serve ``metrics`` at ``/metrics`` of a Flower that is started for ``app``, in this process. Does no I/O.

    Flower serves all that is in the default registry of Prometheus' client.
    """

    def register(sender: Any, **_: Any) -> None:
        command = click.get_current_context(silent=True)
        # Celery imports the commands of all its plugins, Flower's among them, whichever of them is run.
        if sender is app and command is not None and command.info_name == "flower":
            REGISTRY.register(metrics())

    # The first that Flower asks of its app.
    signals.import_modules.connect(register, weak=False)
