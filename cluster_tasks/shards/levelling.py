"""What each node's share is, and moves that bring nodes back to it. Pure: equal input gives equal output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import IntEnum
from functools import cache, partial
from itertools import accumulate
from math import ceil, floor, fsum
from typing import Generic, TypeVar

LOAD_FACTOR = 1.25
"""How far above its share a node may be before it gives things away, and how far below before it is given some."""
# A share that is whole in theory may come out a little beside it.
_EPSILON = 1e-6

Item = TypeVar("Item", bound=Hashable)


def fair_shares(capacities: Mapping[str, float], zones: Mapping[str, str], items: int, count: int) -> dict[str, float]:
    """Each node's share of ``count`` copies of so many items, by capacity, as far as zones leave a choice.

    A node has one copy of an item at most. So has a zone, where there are more zones than copies; where there are
    fewer, it has one at least. Zones that capacity alone would take beyond that are set to it; the rest is shared by
    the others.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for node_id in sorted(capacities):
        members[zones[node_id]].append(node_id)
    at_most, at_least = count <= len(members), count >= len(members)
    shares: dict[str, float] = {}
    rest = items * count
    while members:
        free = _pour(rest, {node_id: capacities[node_id] for each in members.values() for node_id in each}, items)
        excess = {zone: fsum(free[node_id] for node_id in each) - items for zone, each in members.items()}
        beyond = [z for z, by in excess.items() if (at_most and by > _EPSILON) or (at_least and by < -_EPSILON)]
        if not beyond:
            return shares | free
        for zone in beyond:
            shares |= _pour(items, {node_id: capacities[node_id] for node_id in members.pop(zone)}, items)
            rest -= items
    return shares


def _pour(total: float, capacities: Mapping[str, float], most: float) -> dict[str, float]:
    """Share ``total`` by capacity, ``most`` to each: what a large node cannot take goes to the smaller ones."""
    shares = {}
    ascending = sorted(capacities, key=lambda node_id: (capacities[node_id], node_id))
    left = accumulate(capacities[node_id] for node_id in ascending)
    for node_id, capacity_left in reversed(list(zip(ascending, left, strict=True))):
        shares[node_id] = min(most, total * (capacities[node_id] / capacity_left))
        total -= shares[node_id]
    return shares


def bound(share: float) -> int:
    """The most that a node may have: ``LOAD_FACTOR`` times its share, rounded up while that is less than 5."""
    most = LOAD_FACTOR * share
    return ceil(most - _EPSILON) if most < 5 else floor(most + _EPSILON)


class Fullness(IntEnum):
    """What a node has beside its share. In this order nodes are given something new."""

    SCANT = 0
    """Below the share by ``LOAD_FACTOR`` or more: if nothing is new, it is given some of what others have."""
    FAIR = 1
    """No more than the share."""
    ABOVE = 2
    """No more than the share rounded up, or than ``LOAD_FACTOR`` times the share rounded down."""
    BOUND = 3
    """No more than the bound. Where shares are small this is one more, so that other things can stay where they are."""
    BEYOND = 4
    """It has to give something away."""

    @classmethod
    def of(cls, load: int, share: float) -> Fullness:
        """How full ``load`` things make a node of this share."""
        if load <= share + _EPSILON:
            return cls.SCANT if load <= share / LOAD_FACTOR + _EPSILON else cls.FAIR
        if load <= max(ceil(share - _EPSILON), floor(LOAD_FACTOR * share + _EPSILON)):
            return cls.ABOVE
        return cls.BOUND if load <= bound(share) else cls.BEYOND


class Layout(Generic[Item]):
    """Which nodes have which items. Of nodes with room the one with the highest ``score(item, node_id)`` gets an item.

    ``choices(item, taken)`` names the nodes that may have the item beside those in ``taken``; at least one.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        score: Callable[[Item, str], float],
        choices: Callable[[Item, AbstractSet[str]], Iterable[str]],
    ) -> None:
        self.where: dict[Item, set[str]] = {}
        self.held: dict[str, set[Item]] = {node_id: set() for node_id in sorted(shares)}
        self._shares, self._score, self._choices = shares, score, choices
        # Only of what is held: a score of each item with each node would fill the memory.
        self._held_score = cache(score)

    def put(self, item: Item, node_ids: Iterable[str]) -> None:
        """Set who has the item."""
        before, self.where[item] = self.where.get(item, set()), set(node_ids)
        for node_id in before - self.where[item]:
            self.held[node_id].remove(item)
        for node_id in self.where[item] - before:
            self.held[node_id].add(item)

    def best_first(self, item: Item, node_ids: Iterable[str]) -> list[str]:
        """Sort nodes by their scores for the item."""
        return sorted(node_ids, key=lambda node_id: (-self._score(item, node_id), node_id))

    def fill(self, item: Item, count: int) -> None:
        """Add nodes until ``count`` have the item; those below their share come first."""
        if len(self.where[item]) >= count:
            return
        score = cache(partial(self._score, item))
        while len(self.where[item]) < count:
            taken = self.where[item]
            best = min(self._choices(item, taken), key=lambda each: (self._fullness(each, 1), -score(each), each))
            self.put(item, taken | {best})

    def level(self) -> None:
        """Move items from nodes above their bound, and to those far below their share until they have it.

        A node stays where it is if nothing that ``choices`` allows would help it.
        """
        for node_id in self.held:
            while self._fullness(node_id) > Fullness.BOUND and self._shift([node_id], self._has_room):
                pass
            if self._fullness(node_id, 1) == Fullness.SCANT:
                while self._fullness(node_id, 1) <= Fullness.FAIR and self._shift(self._donors(), node_id.__eq__):
                    pass

    def _fullness(self, node_id: str, more: int = 0) -> Fullness:
        return Fullness.of(len(self.held[node_id]) + more, self._shares[node_id])

    def _has_room(self, node_id: str) -> bool:
        return self._fullness(node_id, 1) <= Fullness.BOUND

    def _surplus(self, node_id: str) -> tuple[float, str]:
        return len(self.held[node_id]) - self._shares[node_id], node_id

    def _donors(self) -> list[str]:
        """Those above their share, the fullest first."""
        return sorted(
            (each for each in self.held if self._fullness(each) > Fullness.FAIR), key=self._surplus, reverse=True
        )

    def _shift(self, sources: Sequence[str], is_end: Callable[[str], bool]) -> bool:
        """Take an item from a source and give one to an end, by as few moves as do it; False: there is no way."""
        ways: dict[str, list[tuple[Item, str, str]]] = {node_id: [] for node_id in sources}
        queue = list(sources)
        for source in queue:
            # Each move is allowed by itself; two of one item need not be.
            free = self.held[source].difference(item for item, _, _ in ways[source])
            for item in sorted(free, key=lambda each: (self._held_score(each, source), str(each))):
                for target in sorted(self._choices(item, self.where[item] - {source}), key=self._surplus):
                    if target in ways:
                        continue
                    ways[target] = [*ways[source], (item, source, target)]
                    queue.append(target)
                    if is_end(target):
                        self._move(ways[target])
                        return True
        return False

    def _move(self, way: Iterable[tuple[Item, str, str]]) -> None:
        for item, source, target in way:
            self.put(item, self.where[item] - {source} | {target})
