"""Round robin: each node in turn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from cluster_tasks.balancing.base import Balancer, Views
from cluster_tasks.model import Node, Request


class RoundRobin(Balancer):
    """Serves the nodes in the order of their ids, each request type in a turn of its own.

    The turn goes on from the last id served, so a node that joins or leaves neither skips nor repeats another.
    """

    def __init__(self) -> None:
        self._orders: Views[_Order] = Views(_Order)
        self._last_id: dict[str, str] = {}

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return the node whose id follows the last one served. Raises NoNodeAvailable."""
        order = self._orders.of(request, nodes)
        following = bisect_right(order.ids, self._last_id.get(request.type, ""))
        node = order.nodes[following % len(order.nodes)]
        self._last_id[request.type] = node.id
        return node


class _Order:
    """Nodes sorted by id."""

    def __init__(self, nodes: Sequence[Node], _: _Order | None) -> None:
        self.nodes = sorted(nodes, key=attrgetter("id"))
        self.ids = [node.id for node in self.nodes]
