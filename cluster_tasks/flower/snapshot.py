"""What the cluster page shows, read at one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import BrokerUnavailable, CacheUnavailable, JobNotFound, UnavailableError
from cluster_tasks.failover.events import ClusterEvent
from cluster_tasks.failover.problems import WORKING, problems
from cluster_tasks.failover.quarantine import RETRY_OF
from cluster_tasks.flower.nodes import Beats, Facts, node_rows
from cluster_tasks.model import Node, NodeRole

EVENTS_READ = 500
"""So many tell which nodes were lost."""
EVENTS_SHOWN = 100
QUARANTINED_SHOWN = 50
SELDOM_S = 5.0
"""So often is read what changes slowly and costs a round trip for each collection, or another server."""
STILL_BEATS = 2
"""Heartbeats that a node may miss before it is shown as silent."""


class Snapshots:
    """Takes one snapshot after the other. Not for several threads at once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._beats = cluster, Beats(cluster.clock)
        self._nodes: Sequence[Node] = ()
        self._quarantined: dict[str, Facts] = {}
        self._seldom: Facts = {}
        self._seldom_at_s = float("-inf")

    def take(self) -> Facts:
        """Look at the cluster. Without its registry or cache the rest is told. Raises BrokerUnavailable."""
        try:
            return self._take()
        except BrokerUnavailable:
            self._beats.interrupted()
            raise

    def _take(self) -> Facts:
        cluster, settings, now = self._cluster, self._cluster.settings, self._cluster.clock.time()
        found = []
        try:
            self._nodes = cluster.nodes()
        except BrokerUnavailable:
            raise
        except UnavailableError as exc:
            found.append(f"the registry does not answer, what nodes carry is out of date: {exc}")
        beats, lists, events = cluster.epochs.beats(), cluster.epochs.lengths(), cluster.events.latest(EVENTS_READ)
        still_s, most_s = self._beats.still_s(beats), STILL_BEATS * settings.heartbeat_s
        silent_s = {node_id: seconds for node_id, seconds in still_s.items() if seconds > most_s}
        alive = [node for node in self._nodes if node.id in beats and node.id not in silent_s]
        coordinators = [node for node in alive if NodeRole.MASTER in node.roles]
        working = [node for node in alive if NodeRole.MASTER not in node.roles and node.status in WORKING]
        held = sum(node.load.current_connections for node in alive)
        return {
            "cluster": settings.name,
            "at": now,
            "problems": [*found, *problems(cluster.keys, working, coordinators, lists)],
            "strategies": self._strategies(),
            "nodes": node_rows(self._nodes, beats, silent_s, events, now),
            "in_flight": held + sum(lists.values()),
            "waiting": {queue: count for queue, count in lists.items() if cluster.keys.node_of(queue) is None},
            "events": [_event(event) for event in reversed(events[-EVENTS_SHOWN:])],
            "quarantine": self._quarantine(),
            **self._what_is_read_seldom(),
        }

    def _strategies(self) -> dict[str, str]:
        """By request type, as set in this process; producers with other settings follow those."""
        settings = self._cluster.settings
        types = sorted(set(chain.from_iterable(node.serves for node in self._nodes)))
        return {request_type: settings.strategy_for(request_type) for request_type in types} or {
            "all": settings.strategy
        }

    def _quarantine(self) -> Facts:
        quarantine = self._cluster.quarantine
        ids = quarantine.ids()
        known, self._quarantined = self._quarantined, {}
        for job_id in ids[: -QUARANTINED_SHOWN - 1 : -1]:
            # Read once: a job in quarantine stays as it is, and its arguments may be large.
            if job_id not in known:
                try:
                    job = quarantine.get(job_id)
                except JobNotFound:  # Somebody has just dropped it.
                    continue
                known[job_id] = {
                    "id": job.id, "task": job.task, "at": job.quarantined_at, "crashes": len(job.crashes),
                    "reason": job.reason, RETRY_OF: job.retry_of,
                }  # fmt: skip
            self._quarantined[job_id] = known[job_id]
        return {"count": len(ids), "jobs": list(self._quarantined.values())}

    def _what_is_read_seldom(self) -> Facts:
        if (now_s := self._cluster.clock.monotonic()) - self._seldom_at_s >= SELDOM_S:
            self._seldom, self._seldom_at_s = {"shards": self._shards(), "cache": self._cache()}, now_s
        return self._seldom

    def _shards(self) -> list[Facts]:
        table, rows = self._cluster.assignments, []
        for name in sorted(table.divisions()):
            if found := table.whereabouts(name):
                rows += [
                    {"collection": name, "shard": number, "holders": list(nodes), "ready": sorted(found.ready[number])}
                    for number, nodes in enumerate(found.assigned.nodes)
                ]
        return rows

    def _cache(self) -> Facts | None:
        """None: there is no cache."""
        if self._cluster.settings.cache_url is None:
            return None
        try:
            counted = self._cluster.caches.sums()
        except CacheUnavailable as exc:
            return {"error": str(exc)}
        return {"tiers": [_tier(counted, name) for name in ("local", "redis")]}


def _tier(counted: Mapping[str, float], tier: str) -> Facts:
    hits, misses = counted.get(f"{tier}.hits", 0.0), counted.get(f"{tier}.misses", 0.0)
    asked = hits + misses
    return {
        "tier": tier, "hits": hits, "misses": misses, "saved_s": round(counted.get(f"{tier}.saved_s", 0.0), 1),
        "hit_percent": round(100 * hits / asked, 1) if asked else None,
    }  # fmt: skip


def _event(event: ClusterEvent) -> dict[str, Any]:
    return {"id": event.id, "kind": event.kind, "at": event.timestamp, "facts": event.facts}
