"""How the cluster does, as ``celery -A APP cluster status`` tells it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster_tasks.broker.epochs import MAX_EVENTS
from cluster_tasks.cluster import Cluster
from cluster_tasks.failover.events import ClusterEvent
from cluster_tasks.failover.problems import WORKING, problems
from cluster_tasks.model import Node, NodeRole


@dataclass(frozen=True, slots=True)
class Summary:
    """What there is to know at one glance."""

    cluster: str
    broker: str
    """Its URL, passwords masked."""
    problems: Sequence[str]
    """Why jobs are not done; empty: the cluster is healthy."""
    nodes: Mapping[str, int]
    """How many of each status, coordinators apart. Silent are those that do not beat, whatever they reported last."""
    coordinators: Sequence[str]
    """Ids of those that beat."""
    waiting: Mapping[str, int]
    """Jobs by list: those of nodes, and the waiting lists. Empty lists are left out."""
    held: int
    """Jobs that nodes run or have reserved, as they reported it."""
    in_flight: int
    """Held and waiting."""
    quarantined: int
    """Jobs in quarantine, which wait for somebody to look at them."""
    last_node_lost: ClusterEvent | None
    checks: int
    """Health checks that coordinators have run."""
    stale_commits: int
    """Ends of jobs that were refused, for the node was taken for dead or another one had ended the job."""


def summarize(cluster: Cluster) -> Summary:
    """Look at the cluster. Takes a lease if a node looks dead, else milliseconds. Raises UnavailableError."""
    nodes, lists = cluster.nodes(), cluster.epochs.lengths()
    silent = _silent(cluster, nodes)
    coordinators = [node for node in nodes if NodeRole.MASTER in node.roles]
    workers = [node for node in nodes if NodeRole.MASTER not in node.roles]
    working = [node for node in workers if node.id not in silent and node.status in WORKING]
    held = sum(node.load.current_connections for node in nodes if node.id not in silent)
    return Summary(
        cluster=cluster.settings.name,
        broker=str(cluster.settings.broker_url),
        problems=list(problems(cluster.keys, working, coordinators, lists)),
        nodes=dict(Counter("silent" if node.id in silent else node.status.value for node in workers)),
        coordinators=[node.id for node in coordinators if node.id not in silent],
        waiting=lists,
        held=held,
        in_flight=held + sum(lists.values()),
        quarantined=cluster.quarantine.count(),
        last_node_lost=_last(cluster.events.latest(MAX_EVENTS), "node lost"),
        checks=cluster.checks_done(),
        stale_commits=cluster.stale_commits(),
    )


def _silent(cluster: Cluster, nodes: Sequence[Node]) -> Collection[str]:
    """Return the ids of nodes that do not beat."""
    lease_s, clock = cluster.settings.lease_s, cluster.clock
    before, now = cluster.epochs.beats(), clock.time()
    # The clocks of hosts differ: a record that looks old is a reason to look, and no more.
    silent = {node.id for node in nodes if node.id not in before or abs(now - node.last_seen) > lease_s}
    until_s = clock.monotonic() + lease_s
    while silent and clock.monotonic() < until_s:
        time.sleep(cluster.settings.heartbeat_s / 4)
        beats = cluster.epochs.beats()
        silent = {node_id for node_id in silent if beats.get(node_id) in (None, before.get(node_id))}
    return silent


def _last(events: Sequence[ClusterEvent], kind: str) -> ClusterEvent | None:
    return next((event for event in reversed(events) if event.kind == kind), None)
