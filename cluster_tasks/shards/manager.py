"""Brings the assignment of shards in line with the nodes and the collections that there are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.errors import InvalidArguments, NodeNotFound, ShardNotFound
from cluster_tasks.model import Node, NodeRole, NodeStatus
from cluster_tasks.shards.assignments import Assigned, Assignments, AssignmentTable, Division, EntryOf
from cluster_tasks.shards.placement import Assignment, Holder, Shard, moves, place

logger = logging.getLogger(__name__)

SERVED = "retrieval"
"""The request type of the jobs that search."""


class ShardManager:
    """Plans who holds what. Any number of processes may: a plan that was made of another assignment is not written.

    ``nodes`` returns those that exist, as the broker sees them. Everything raises UnavailableError when Redis or the
    registry does not answer.
    """

    def __init__(
        self,
        table: AssignmentTable,
        epochs: EpochTable,
        nodes: Callable[[], Sequence[Node]],
        entry: EntryOf,
        replicas: int,
    ) -> None:
        self._table, self._epochs, self._nodes, self._entry, self._replicas = table, epochs, nodes, entry, replicas
        self._planned: object = None

    def plan(self) -> bool:
        """Assign shards anew if nodes or collections have changed; return whether anything changed.

        While the registry does not know a node that holds shards and may work, nothing is planned: an empty registry
        is no loss of all nodes.
        """
        # Before all that the plan is made of: what changes meanwhile is then seen by the next one.
        before = self._table.read()
        divisions, standing, nodes = self._table.divisions(), self._epochs.beats(), self._nodes()
        unknown = {node_id for node_id in _holding(before) if node_id in standing} - {node.id for node in nodes}
        if unknown:
            logger.info("shards stay where they are: the registry does not know %s", ", ".join(sorted(unknown)))
            return False
        holders = _holders(nodes, standing)
        inputs = divisions, sorted(holders, key=lambda holder: holder.node_id)
        if self._planned == (before.version, inputs):
            return False
        after = self._placed(divisions, holders, before)
        changes = _changes(before.collections, after)
        version = self._table.write(before.version, changes, self._event(before, after)) if changes else before.version
        if version is None:
            return False
        for collection in before.collections.keys() | after.keys():
            self._table.sweep(collection, after.get(collection))
        self._planned = version, inputs
        return bool(changes)

    def move(self, shard: Shard, node_id: str) -> Assigned:
        """Put a node in the place of the primary of a shard; return who holds the shards of its collection now.

        A node that holds the shard already becomes its primary. Later plans leave the shard there while nodes and
        collections stay as they are. Raises ShardNotFound, NodeNotFound, and InvalidArguments for a node that cannot
        hold shards, or that a plan would make give one away again.
        """
        while True:
            before = self._table.read()
            assigned = before.collections.get(shard.collection)
            if assigned is None or not 0 <= shard.number < len(assigned.nodes):
                raise ShardNotFound(f"no shard {shard} is assigned")
            holders = self._holders_with(node_id)
            held = assigned.nodes[shard.number]
            kept = [other for other in (held if node_id in held else held[1:]) if other != node_id]
            nodes = list(assigned.nodes)
            nodes[shard.number] = (node_id, *kept)
            after = Assigned(assigned.generation, tuple(nodes))
            if after == assigned:
                return after
            wanted = replace(before, collections={**before.collections, shard.collection: after})
            self._check_stays(node_id, shard, wanted, holders)
            event = self._entry("shard moved", shard=str(shard), node=node_id, before=list(held))
            if self._table.write(before.version, {shard.collection: after}, event):
                return after

    def _holders_with(self, node_id: str) -> list[Holder]:
        """Return all holders. Raises NodeNotFound and InvalidArguments if the node is none."""
        nodes, standing = {node.id: node for node in self._nodes()}, self._epochs.beats()
        if node_id not in nodes or node_id not in standing:
            raise NodeNotFound(node_id, nodes)
        if not can_hold(nodes[node_id]):
            raise InvalidArguments(
                f"node {node_id} cannot hold shards: it drains, or has not the roles {NodeRole.WORKER} and "
                f"{NodeRole.CACHE}, or does not serve {SERVED}"
            )
        return _holders(nodes.values(), standing)

    def _check_stays(self, node_id: str, shard: Shard, wanted: Assignments, holders: Sequence[Holder]) -> None:
        """Raise InvalidArguments if a plan would take anything from a node that is given a shard."""
        planned = Assignments(collections=self._placed(self._table.divisions(), holders, wanted))
        if not wanted.shards_of(node_id).keys() <= planned.shards_of(node_id).keys():
            raise InvalidArguments(
                f"with shard {shard} node {node_id} would have too many: a plan would take one away again at once"
            )

    def _placed(
        self, divisions: Mapping[str, Division], holders: Sequence[Holder], before: Assignments
    ) -> dict[str, Assigned]:
        shards = [Shard(name, number) for name, known in divisions.items() for number in range(known.shards)]
        placed = place(shards, holders, self._replicas, _by_shard(before.collections))
        return {
            name: Assigned(known.generation, tuple(placed[Shard(name, number)] for number in range(known.shards)))
            for name, known in divisions.items()
        }

    def _event(self, before: Assignments, after: Mapping[str, Assigned]) -> Mapping[str, str | float]:
        loads: Counter[str] = Counter()
        drops: Counter[str] = Counter()
        for move in moves(_by_shard(before.collections), _by_shard(after)):
            loads.update(move.loads)
            drops.update(move.drops)
        return self._entry("shards assigned", collections=sorted(_changes(before.collections, after)),
                           loads=dict(loads), drops=dict(drops))  # fmt: skip


def can_hold(node: Node) -> bool:
    """Whether shards may be assigned to a node, as far as its record tells."""
    return (
        {NodeRole.CACHE, NodeRole.WORKER} <= node.roles
        and SERVED in node.serves
        and node.status in (NodeStatus.ONLINE, NodeStatus.BUSY)
    )


def holder_of(node: Node) -> Holder:
    """Return a node as the plan sees it: its capacity is the jobs that it runs at a time."""
    return Holder(node.id, max(1, node.capacity.max_connections), node.zone)


def _holders(nodes: Iterable[Node], standing: Container[str]) -> list[Holder]:
    return [holder_of(node) for node in nodes if node.id in standing and can_hold(node)]


def _by_shard(collections: Mapping[str, Assigned]) -> Assignment:
    return {
        Shard(name, number): nodes
        for name, assigned in collections.items()
        for number, nodes in enumerate(assigned.nodes)
    }


def _holding(assignments: Assignments) -> set[str]:
    return {node_id for assigned in assignments.collections.values() for nodes in assigned.nodes for node_id in nodes}


def _changes(before: Mapping[str, Assigned], after: Mapping[str, Assigned]) -> dict[str, Assigned | None]:
    gone: dict[str, Assigned | None] = dict.fromkeys(before.keys() - after.keys())
    return gone | {name: assigned for name, assigned in after.items() if before.get(name) != assigned}
