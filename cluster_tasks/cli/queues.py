"""The lists that hold jobs, and who takes from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.failover.problems import WORKING
from cluster_tasks.keys import ANY_TYPE, BOUND, Keys
from cluster_tasks.model import Node, NodeRole
from cluster_tasks.redis_store import foreign_errors


class Kind(StrEnum):
    """What a list is for."""

    NODE = "node"
    BOUND = "bound"
    """Of a node, and nobody else takes from it."""
    WAITING = "waiting"
    SUSPECT = "suspect"
    DELAYED = "delayed"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A list, and who takes from it."""

    queue: str
    kind: Kind
    jobs: int
    takers: list[str]
    """Ids of nodes that are online or busy."""
    held: int
    """Jobs that they run or have reserved."""
    slots: int
    """Jobs that they can run at a time."""

    @property
    def stuck(self) -> bool:
        """Whether nobody takes what waits here."""
        return bool(self.jobs) and not self.takers and self.kind is not Kind.DELAYED


def queue_rows(cluster: Cluster) -> list[QueueRow]:
    """Return the lists with jobs, and those of nodes without: first what nobody takes, then the longest.

    Raises UnavailableError.
    """
    nodes, lengths, keys = cluster.nodes(), dict(cluster.epochs.lengths()), cluster.keys
    with foreign_errors(BrokerUnavailable, "reading queue lengths"), cluster.client.pipeline(transaction=False) as pipe:
        pipe.zcard(keys.delayed)
        pipe.llen(keys.control_queue)
        others: Any = pipe.execute()
    names = (keys.delayed, keys.control_queue)
    lengths |= {queue: length for queue, length in zip(names, others, strict=True) if length}
    return rows(keys, nodes, lengths)


def rows(keys: Keys, nodes: Sequence[Node], lengths: Mapping[str, int]) -> list[QueueRow]:
    """Return a row for each list, in the order in which they are shown. Pure."""
    own = {keys.node_queue(node.id): 0 for node in nodes if NodeRole.MASTER not in node.roles}
    working = [node for node in nodes if node.status in WORKING]
    made = [_row(keys, queue, jobs, working) for queue, jobs in ({**own, **lengths}).items()]
    return sorted(made, key=lambda row: (not row.stuck, -row.jobs, row.queue))


def _row(keys: Keys, queue: str, jobs: int, working: Sequence[Node]) -> QueueRow:
    kind = _kind(keys, queue)
    takers = [node for node in working if _takes(keys, kind, queue, node)]
    return QueueRow(
        queue,
        kind,
        jobs,
        sorted(node.id for node in takers),
        sum(node.load.current_connections for node in takers),
        sum(node.capacity.max_connections for node in takers),
    )


def _kind(keys: Keys, queue: str) -> Kind:
    if queue in (keys.delayed, keys.control_queue):
        return Kind.DELAYED if queue == keys.delayed else Kind.CONTROL
    if keys.node_of(queue) is not None:
        return Kind.BOUND if queue.endswith(BOUND) else Kind.NODE
    is_suspect = queue.startswith(keys.suspect_queue(ANY_TYPE).removesuffix(ANY_TYPE))
    return Kind.SUSPECT if is_suspect else Kind.WAITING


def _takes(keys: Keys, kind: Kind, queue: str, node: Node) -> bool:
    is_coordinator = NodeRole.MASTER in node.roles
    if kind is Kind.CONTROL:
        return is_coordinator
    if is_coordinator:
        return False
    if kind in (Kind.NODE, Kind.BOUND):
        return keys.node_of(queue) == node.id
    if kind is Kind.DELAYED:
        return True
    queue_of = keys.suspect_queue if kind is Kind.SUSPECT else keys.waiting_queue
    return queue in {queue_of(name) for name in (*node.serves, ANY_TYPE)}
