"""Celery workers as a cluster: balanced jobs, and no job lost when a node dies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster_tasks.cluster import Cluster, cluster_of
    from cluster_tasks.errors import ClusterError
    from cluster_tasks.model import Node, NodeEvent, NodeFilter, NodeRole, NodeStatus, Request
    from cluster_tasks.tasks.base import ClusterTask

__all__ = [
    "Cluster",
    "ClusterError",
    "ClusterTask",
    "Node",
    "NodeEvent",
    "NodeFilter",
    "NodeRole",
    "NodeStatus",
    "Request",
    "cluster_of",
]

# Imported when they are asked for: a command that only starts another program needs none of them.
_MODULES = {
    "Cluster": "cluster",
    "ClusterError": "errors",
    "ClusterTask": "tasks.base",
    "cluster_of": "cluster",
    **dict.fromkeys(("Node", "NodeEvent", "NodeFilter", "NodeRole", "NodeStatus", "Request"), "model"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    # ``celery -A cluster_tasks`` asks for this name. The ready-made app is made for those who want it only.
    if name == "celery":
        from cluster_tasks.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
