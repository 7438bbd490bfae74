"""The nodes as the page shows them: what the registry says, corrected by what the broker knows. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.clock import Clock
from cluster_tasks.failover.events import ClusterEvent
from cluster_tasks.model import Node

LOST = "lost"
"""It was fenced: its jobs are with others."""
SILENT = "silent"
"""It does not beat, and nobody has fenced it yet."""
UNREGISTERED = "unregistered"
"""It works, and the registry does not know it: it has just begun, or the registry has forgotten."""
LOST_SHOWN_S = 15 * 60.0
"""So long a node that was lost, and did not come back, stays on the page."""

Facts = dict[str, Any]


class Beats:
    """For how long each beat counter has stood still, as one process has seen it on its own clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Beat, float]] = {}

    def interrupted(self) -> None:
        """Start anew: nodes could not beat either."""
        self._seen.clear()

    def still_s(self, beats: Mapping[str, Beat]) -> dict[str, float]:
        """Take in what was read now; return for each node how long its counter is known to stand still, in seconds."""
        now_s = self._clock.monotonic()
        before, self._seen = self._seen, {}
        for node_id, beat in beats.items():
            known = before.get(node_id)
            self._seen[node_id] = known if known and known[0] == beat else (beat, now_s)
        return {node_id: now_s - since_s for node_id, (_, since_s) in self._seen.items()}


def node_rows(
    registered: Sequence[Node],
    beats: Mapping[str, Beat],
    silent_s: Mapping[str, float],
    events: Sequence[ClusterEvent],
    now: float,
) -> list[Facts]:
    """Return the nodes, sorted by id.

    ``silent_s`` has those that do not beat, and for how long. ``events``, the oldest first, tell which were lost; those
    that did not come back are shown for ``LOST_SHOWN_S`` before ``now``, in seconds since 1970.
    """
    rows = {}
    for node in registered:
        beat = beats.get(node.id)
        if beat is not None and beat.epoch == node.epoch:
            rows[node.id] = _facts(node, now)
    for node_id, beat in beats.items():
        rows.setdefault(node_id, {"id": node_id, "status": UNREGISTERED, "epoch": beat.epoch})
        if node_id in silent_s:
            rows[node_id] |= {"status": SILENT, "silent_s": silent_s[node_id]}
    for facts in _lost(events, beats, now):
        rows.setdefault(facts["id"], facts)
    return [rows[node_id] for node_id in sorted(rows)]


def _facts(node: Node, now: float) -> Facts:
    load = node.load
    return {
        "id": node.id,
        "status": node.status.value,
        "limit": node.limit,
        "epoch": node.epoch,
        "roles": sorted(node.roles),
        "zone": node.zone,
        "serves": sorted(node.serves),
        "held": load.current_connections,
        "slots": node.capacity.max_connections,
        "queue": load.queue_length,
        "qps": round(load.current_qps, 2),
        "cpu_percent": round(load.cpu_usage_percent),
        "memory_mb": round(load.memory_usage_mb),
        "success_rate": round(load.success_rate, 4),
        "last_seen_s": round(max(now - node.last_seen, 0.0), 1) if node.last_seen else None,
    }


def _lost(events: Sequence[ClusterEvent], standing: Collection[str], now: float) -> Iterator[Facts]:
    lost: dict[str, Facts] = {}
    for event in events:
        node_id, epoch = str(event.facts.get("node")), event.facts.get("epoch")
        if event.kind == "node lost":
            lost_s = now - event.timestamp
            lost[node_id] = {"id": node_id, "status": LOST, "epoch": epoch, "lost_s": round(max(lost_s, 0.0), 1)}
        elif event.kind == "jobs moved" and node_id in lost and lost[node_id]["epoch"] == epoch:
            lost[node_id]["moved"] = {"held": event.facts.get("held"), "listed": event.facts.get("listed")}
        elif event.kind in ("node joined", "node left"):
            lost.pop(node_id, None)
    return (facts for facts in lost.values() if facts["id"] not in standing and facts["lost_s"] <= LOST_SHOWN_S)
