"""Remote control of a node: Celery's commands, where the cluster knows more than the worker."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from celery.worker.control import Panel

from cluster_tasks.broker.delays import DelayedJob
from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.model import NodeFilter, NodeRole

SHOWN_AT_MOST = 1_000

_stock = {name: Panel.data[name] for name in ("revoke", "revoke_by_stamped_headers", "scheduled")}


def install() -> None:
    """Answer these commands in this process."""
    Panel.data.update(revoke=_revoke, revoke_by_stamped_headers=_revoke_by_stamped_headers)
    Panel.data.update(scheduled=_scheduled, dump_schedule=_scheduled)


def _revoke(state: Any, task_id: Any, *args: Any, **kwargs: Any) -> Any:
    # Who joins later has to know; the command line of Celery only broadcasts.
    cluster_of(state.app).revocations.add([task_id] if isinstance(task_id, str) else task_id)
    return _stock["revoke"](state, task_id, *args, **kwargs)


def _revoke_by_stamped_headers(state: Any, headers: Any, *args: Any, **kwargs: Any) -> Any:
    stamps = dict(pair.split("=", 1) for pair in headers) if isinstance(headers, list) else headers
    cluster_of(state.app).revocations.add_stamps(stamps)
    return _stock["revoke_by_stamped_headers"](state, headers, *args, **kwargs)


def _scheduled(state: Any, **kwargs: Any) -> list[Any]:
    """Celery's own, and the delayed jobs of the cluster, each told by one node."""
    return [*_stock["scheduled"](state, **kwargs), *_delayed(cluster_of(state.app), state.hostname)]


def _delayed(cluster: Cluster, hostname: str) -> Iterator[dict[str, Any]]:
    serving = {node.id: node.serves for node in cluster.nodes(NodeFilter(role=NodeRole.WORKER))}
    for job in cluster.delayed(SHOWN_AT_MOST):
        able = [node_id for node_id, types in serving.items() if job.request_type in types] or list(serving)
        teller = job.node if job.node in serving else min(able, default=hostname)
        if teller == hostname:
            yield {
                "eta": datetime.fromtimestamp(job.due, UTC).isoformat(),
                "priority": 6,
                "request": _info(job, hostname),
            }


def _info(job: DelayedJob, hostname: str) -> dict[str, Any]:
    """What Celery tells of a request."""
    headers = job.payload["headers"]
    return {
        "id": headers.get("id"),
        "name": headers.get("task"),
        "args": headers.get("argsrepr"),
        "kwargs": headers.get("kwargsrepr"),
        "type": headers.get("task"),
        "hostname": hostname,
        "time_start": None,
        "acknowledged": False,
        "delivery_info": job.payload["properties"].get("delivery_info"),
        "worker_pid": None,
    }
