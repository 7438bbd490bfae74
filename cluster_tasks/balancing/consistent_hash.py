"""Consistent hash: requests that share an affinity go to the same node, as long as it is not overloaded."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, islice
from random import Random

from cluster_tasks.balancing.base import Balancer, SentCounter, Views, reported_in_flight
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.model import Node, Request

LOAD_FACTOR = 1.25
"""The ``c`` of the bound: how far above its fair share a node may be loaded."""

_POINTS_PER_DIGEST = 8


class ConsistentHash(Balancer):
    """A hash ring with virtual nodes and bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016).

    A key's home is the first point clockwise of its hash. A node takes one more job while that keeps it within
    ``ceil(c * (m + 1) * s)``, where ``m`` are the jobs in flight on all nodes, ``s`` is the node's share of all
    ``capacity.max_connections`` (each at least 1; 1/n if all are equal) and ``c`` is ``load_factor``; else the next
    node clockwise is asked. The bounds add up to more than ``m``, so one always has room.

    Size counts in the bound and not on the ring: a key's home depends on the ids of the nodes alone, so that a
    resized pool moves no key, and a small node passes on what is above its share. Losing a node moves only its keys.

    A request without affinity goes to the one of two random nodes that has fewer jobs in flight.
    """

    def __init__(self, rng: Random, virtual_nodes: int = 160, load_factor: float = LOAD_FACTOR) -> None:
        if virtual_nodes < 1:
            raise ConfigurationError(f"virtual_nodes={virtual_nodes}: a ring needs at least 1 point for each node")
        if not load_factor >= 1:
            raise ConfigurationError(f"load_factor={load_factor}: below 1 the nodes could not hold all jobs")
        self._rng = rng
        self._virtual_nodes = virtual_nodes
        self._load_factor = load_factor
        self._sent = SentCounter()
        self._circles: Views[_Circle] = Views(lambda nodes, _: _Circle(nodes, self._virtual_nodes))

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return the first node with room from the key's place on. Raises NoNodeAvailable."""
        circle = self._circles.of(request, nodes)
        loads = self._sent.in_flight_each(circle.reported)
        if request.affinity:
            place = circle.first_with_room(request.affinity, loads, self._load_factor)
        else:
            place = min(self._rng.sample(range(len(loads)), min(2, len(loads))), key=loads.__getitem__)
        node = nodes[place]
        self._sent.add(node.id)
        return node

    def update(self, nodes: Sequence[Node]) -> None:
        """Count anew from a fresh view; the ring stays while the ids do."""
        self._sent.clear()


class _Circle:
    """The ring of one sequence of nodes, with their sizes and reported loads in its order."""

    def __init__(self, nodes: Sequence[Node], virtual_nodes: int) -> None:
        self.reported = reported_in_flight(nodes)
        self._sizes = [max(1, node.capacity.max_connections) for node in nodes]
        self._total_size = sum(self._sizes)
        self._places = {node.id: place for place, node in enumerate(nodes)}
        self._ring = _ring(frozenset(self._places), virtual_nodes)

    def first_with_room(self, key: str, loads: list[int], load_factor: float) -> int:
        """The place of the first node clockwise of ``key`` that may take one more job."""
        # load + 1 <= ceil(allowed) is load < allowed, as loads are whole; without the division it is exact, too.
        allowed = load_factor * (sum(loads) + 1)
        points, owners = self._ring.points, self._ring.owners
        places, sizes, total_size = self._places, self._sizes, self._total_size
        home = bisect_left(points, _hash(key))
        for step in chain(range(home, len(points)), range(home)):
            place = places[owners[step]]
            if loads[place] * total_size < allowed * sizes[place]:
                return place
        raise AssertionError("the bounds add up to more than the load, so one node has room")


@dataclass(frozen=True, slots=True)
class _Ring:
    """Points in ascending order, and the id of each point's node."""

    points: list[int]
    owners: list[str]


# Rings are few and shared: one for each set of ids that is in use, however many balancers and snapshots there are.
@lru_cache(maxsize=16)
def _ring(node_ids: frozenset[str], virtual_nodes: int) -> _Ring:
    # Of two nodes that hash to the same point the smaller id owns it, whatever the order of the set.
    owner = {point: node_id for node_id in sorted(node_ids, reverse=True) for point in _points(node_id, virtual_nodes)}
    points = sorted(owner)
    return _Ring(points, [owner[point] for point in points])


@lru_cache(maxsize=1024)
def _points(node_id: str, virtual_nodes: int) -> tuple[int, ...]:
    """The points of a node, ascending. A greater count keeps those of a smaller one."""
    blocks = range(math.ceil(virtual_nodes / _POINTS_PER_DIGEST))
    digests = (blake2b(f"{node_id}#{block}".encode()).digest() for block in blocks)
    points = chain.from_iterable(struct.unpack(f">{_POINTS_PER_DIGEST}Q", digest) for digest in digests)
    return tuple(sorted(islice(points, virtual_nodes)))


def _hash(key: str) -> int:
    # A prompt may hold half of a surrogate pair, which UTF-8 refuses.
    return int.from_bytes(blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
