"""Least connection: the node with the fewest jobs in flight."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cluster_tasks.balancing.base import Balancer, SentCounter, Views, reported_in_flight
from cluster_tasks.model import Node, Request


class LeastConnection(Balancer):
    """Chooses the node with the fewest jobs in flight, at random among equals.

    In flight are the jobs of the snapshot and those that this process has sent since. Producers do not see each
    other's, so the random choice keeps them from all filling the same node.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._sent = SentCounter()
        self._reported: Views[list[tuple[str, int]]] = Views(lambda nodes, _: reported_in_flight(nodes))

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return a node with the fewest jobs in flight. Raises NoNodeAvailable."""
        loads = self._sent.in_flight_each(self._reported.of(request, nodes))
        fewest = min(loads)
        node = nodes[self._rng.choice([place for place, load in enumerate(loads) if load == fewest])]
        self._sent.add(node.id)
        return node

    def update(self, nodes: Sequence[Node]) -> None:
        """Count anew from a fresh view."""
        self._sent.clear()
