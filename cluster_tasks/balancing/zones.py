"""Zones: a caller's own datacentre first, the others when that has too much to do. It comes before every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster_tasks.model import Node


@dataclass(frozen=True, slots=True)
class Carried:
    """What nodes carry together: jobs in flight, and the slots that they have for them."""

    in_flight: int = 0
    slots: int = 0

    @classmethod
    def by(cls, nodes: Iterable[Node]) -> Carried:
        """What their snapshots say. A node counts as one slot at least, as for the strategies."""
        loads = [(node.in_flight, max(1, node.capacity.max_connections)) for node in nodes]
        return cls(sum(load for load, _ in loads), sum(slots for _, slots in loads))

    def __add__(self, other: Carried) -> Carried:
        return Carried(self.in_flight + other.in_flight, self.slots + other.slots)


def has_room(near: Carried, far: Carried, bound: float) -> bool:
    """Whether one more job should stay near: in a zone with slots, beside ``far``, all other zones.

    It should while a slot is free there, and while the jobs for each slot would be at most ``bound`` times those of all
    zones together. With nothing else to choose from it should always.
    """
    if not far.slots or near.in_flight < near.slots:
        return True
    # Without division: (near + 1) / near slots <= bound * (all + 1) / all slots.
    every = near + far
    return (near.in_flight + 1) * every.slots <= bound * (every.in_flight + 1) * near.slots


class Zones:
    """The nodes of one snapshot that may take a request type, split into those of one zone and the others.

    What is taken counts as sent there. Not thread-safe, like a balancer.
    """

    def __init__(self, nodes: Sequence[Node], zone: str, bound: float) -> None:
        self.near = tuple(node for node in nodes if node.zone == zone)
        self.far = tuple(node for node in nodes if node.zone != zone)
        self._near, self._far, self._bound = Carried.by(self.near), Carried.by(self.far), bound
        self._near_ids = frozenset(node.id for node in self.near)

    def is_near(self) -> bool:
        """Whether the next job should stay in the zone."""
        return bool(self.near) and has_room(self._near, self._far, self._bound)

    def holds(self, node: Node) -> bool:
        """Whether a node is in the zone."""
        return node.id in self._near_ids

    def count(self, near: bool) -> None:
        """Count one more job as sent to the zone, or to the others."""
        if near:
            self._near += ONE_MORE
        else:
            self._far += ONE_MORE


ONE_MORE = Carried(in_flight=1)
