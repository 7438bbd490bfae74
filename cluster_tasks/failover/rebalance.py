"""Moving jobs from lists that are too long to nodes whose lists are shorter than their share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import redis

from cluster_tasks.broker.epochs import EpochTable, Lists
from cluster_tasks.broker.message import Placement, replace_message
from cluster_tasks.broker.placement import Placer
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.failover.events import EventLog
from cluster_tasks.keys import ANY_TYPE, Keys, priority_suffixes
from cluster_tasks.model import Node, NodeRole, NodeStatus
from cluster_tasks.redis_store import foreign_errors
from cluster_tasks.settings import ZONE_BOUND

ACT_ABOVE = 1.2
"""A list that is longer than its share by less than this factor is left alone: jobs are where they are warm."""
CHUNK = 100


@dataclass(frozen=True, slots=True)
class NodeList:
    """The list of a node, of one priority."""

    node_id: str
    serves: frozenset[str]
    capacity: int
    """Jobs that the node runs at a time; 0: it may not be given any."""
    length: int
    zone: str = ""
    """The datacentre it is in; empty: it does not say."""


@dataclass(slots=True)
class Plan:
    """Who gives away how many of the jobs that came last, and who has room for how many."""

    lists: Mapping[str, NodeList]
    surplus: Mapping[str, int]
    room: dict[str, int] = field(default_factory=dict)
    apart: Mapping[str, int] = field(default_factory=dict)
    """A number for each node; between those of two numbers nothing is moved."""

    def assign(self, source: str, request_type: str) -> str | None:
        """Return the node that a job of ``source`` goes to, its room one less; None: it stays where it is.

        One with an empty list comes first, then one of the same zone.
        """
        able = [node_id for node_id in self.room if self._can_run(node_id, source, request_type)]
        if not able:
            return None
        chosen = max(able, key=lambda node_id: self._fitness(node_id, source))
        self.room[chosen] -= 1
        if not self.room[chosen]:
            del self.room[chosen]
        return chosen

    def _fitness(self, node_id: str, source: str) -> tuple[bool, bool, float, str]:
        own = self.lists[node_id]
        return not own.length, own.zone == self.lists[source].zone, self.room[node_id] / own.capacity, node_id

    def _can_run(self, node_id: str, source: str, request_type: str) -> bool:
        if self.apart.get(node_id) != self.apart.get(source):
            return False
        serves = self.lists[node_id].serves
        if request_type == ANY_TYPE:
            # Every node runs it; between nodes that have nothing in common the shares are not compared.
            return bool(serves & self.lists[source].serves)
        return request_type in serves


def make_plan(lists: Sequence[NodeList], zone_bound: float = ZONE_BOUND) -> Plan:
    """Plan how the lists of one priority come to their shares.

    The share of a node is its part of the capacity of all nodes that it has a request type in common with, directly or
    by others; but of those of its zone alone, while no zone has more than ``zone_bound`` times its share and no node
    that may be given jobs has none. So what callers place in their own zone stays there, and no node is left idle.

    A list above ``ACT_ABOVE`` of its share gives the rest away, and nobody gets more than his share, rounded up; so
    what is balanced stays as it is.
    """
    surplus: dict[str, int] = {}
    room: dict[str, int] = {}
    apart: dict[str, int] = {}
    groups = [part for group in _groups(lists) for part in _zones(group, zone_bound)]
    for number, group in enumerate(groups):
        apart.update((each.node_id, number) for each in group)
        capacity, total = sum(each.capacity for each in group), sum(each.length for each in group)
        for each in group if capacity else ():
            share = total * each.capacity / capacity
            if each.length > ACT_ABOVE * share and each.length > ceil(share):
                surplus[each.node_id] = each.length - ceil(share)
            elif each.length < ceil(share):
                room[each.node_id] = ceil(share) - each.length
    return Plan({each.node_id: each for each in lists}, surplus, room, apart)


def _zones(group: list[NodeList], bound: float) -> list[list[NodeList]]:
    """The groups in each zone of a group, if each zone can keep what it has; else the whole group."""
    zones: dict[str, list[NodeList]] = {}
    for each in group:
        zones.setdefault(each.zone, []).append(each)
    total, capacity = sum(each.length for each in group), sum(each.capacity for each in group)
    keep = all(
        sum(each.length for each in zone) * capacity <= bound * total * sum(each.capacity for each in zone)
        for zone in zones.values()
    )
    if not keep or not all(each.length for each in group if each.capacity):
        return [group]
    # What connects two nodes may be in another zone.
    return [part for zone in zones.values() for part in _groups(zone)]


def _groups(lists: Sequence[NodeList]) -> list[list[NodeList]]:
    """Those that are connected by request types."""
    groups: list[tuple[set[str], list[NodeList]]] = []
    for each in lists:
        joined = (set(each.serves), [each])
        apart = []
        for types, members in groups:
            if types & joined[0]:
                joined = (joined[0] | types, members + joined[1])
            else:
                apart.append((types, members))
        groups = [*apart, joined]
    return [members for _, members in groups]


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """How many jobs were moved, by the node that had them and by the node that got them."""

    taken: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """How many jobs were moved."""
        return sum(self.taken.values())


class Rebalance:
    """Applies plans. Raises BrokerUnavailable when Redis does not answer."""

    def __init__(
        self, client: redis.Redis, keys: Keys, epochs: EpochTable, events: EventLog, zone_bound: float = ZONE_BOUND
    ) -> None:
        self._client, self._keys, self._epochs, self._events = client, keys, epochs, events
        self._zone_bound = zone_bound
        self._placer = Placer(client, keys)

    def run(self, nodes: Sequence[Node], most: int | None = None) -> Rebalanced:
        """Move jobs of ``nodes`` towards their shares, each priority by itself; ``most`` for each list, None: all.

        Running jobs and those that are bound to a node stay. Nodes on which nothing is placed, because they drain or
        have such a limit, give all they have. The jobs that came last are moved, and those of a node keep their order.
        Safe to repeat, to run twice at once and beside everything that nodes and producers do.
        """
        taken: Counter[str] = Counter()
        given: Counter[str] = Counter()
        with foreign_errors(BrokerUnavailable, "rebalancing"):
            for suffix, lists in self._read(nodes):
                plan = make_plan(lists, self._zone_bound)
                for source, surplus in plan.surplus.items():
                    for target in self._move(plan, source, suffix, surplus, most):
                        taken[source] += 1
                        given[self._keys.node_of(target) or target] += 1
        if taken:
            self._events.add("rebalanced", moved=taken.total(), taken=dict(taken), given=dict(given))
        return Rebalanced(taken, given)

    def _read(self, nodes: Sequence[Node]) -> Iterator[tuple[str, list[NodeList]]]:
        standing, known = self._epochs.beats(), self._epochs.lists()
        able = [node for node in nodes if node.id in standing and NodeRole.WORKER in node.roles and node.serves]
        queues = {node.id: self._keys.node_queue(node.id) for node in able}
        if not any(known.lengths.get(queue) for queue in queues.values()):
            return
        for suffix in priority_suffixes():
            with self._client.pipeline(transaction=False) as pipe:
                for queue in queues.values():
                    pipe.llen(queue + suffix)
                lengths = pipe.execute()
            lists = [
                NodeList(node.id, node.serves, _capacity(node, queues[node.id], known), length, node.zone)
                for node, length in zip(able, lengths, strict=True)
            ]
            if any(lengths):
                yield suffix, lists

    def _move(self, plan: Plan, source: str, suffix: str, surplus: int, most: int | None) -> Iterator[str]:
        queue = self._keys.node_queue(source)
        # The oldest of those that came last go first: others that are moved later come behind them.
        end, stop = surplus, max(0, surplus - most) if most else 0
        while end > stop and plan.room:
            first = max(stop, end - CHUNK)
            messages: Any = self._client.lrange(queue + suffix, first, end - 1)
            chosen = list(self._assigned(plan, source, reversed(messages)))
            if chosen:
                yield from self._placer.move_newest(queue + suffix, queue, first, chosen)
            end = first

    def _assigned(self, plan: Plan, source: str, messages: Iterator[bytes]) -> Iterator[Placement]:
        for message in messages:
            try:
                placement = replace_message(message, self._keys, delivered=False)
            except ValueError:
                # Whoever fetches it sets it aside.
                continue
            if target := plan.assign(source, placement.request_type):
                yield replace(placement, queue=self._keys.node_queue(target))


def _capacity(node: Node, queue: str, known: Lists) -> int:
    if node.status not in (NodeStatus.ONLINE, NodeStatus.BUSY) or not known.may_get(queue):
        return 0
    limit = known.limits.get(queue)
    return min(node.capacity.max_connections, limit.slots if limit else node.capacity.max_connections)
