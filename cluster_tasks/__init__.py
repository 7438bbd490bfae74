"""Celery workers as a cluster: balanced jobs, and no job lost when a node dies."""

from __future__ import annotations

from typing import Any

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


def __getattr__(name: str) -> Any:
    # ``celery -A cluster_tasks`` asks for this name. The ready-made app is made for those who want it only.
    if name == "celery":
        from cluster_tasks.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
