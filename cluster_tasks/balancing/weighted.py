"""Weighted: each node in turn, in proportion to its weight."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from operator import attrgetter

from cluster_tasks.balancing.base import Balancer, Views
from cluster_tasks.model import Node, Request

logger = logging.getLogger(__name__)

WEIGHT = "weight"
"""The entry of a node's metadata that holds its weight."""


class Weighted(Balancer):
    """Smooth weighted round robin, the algorithm of nginx (2012): each request type has a turn of its own.

    Every choice adds to each node's credit its weight, takes the node with the most credit, and takes the sum of all
    weights off it. With whole weights every cycle of that sum's length serves each node exactly its weight times, and
    a heavy node's turns lie apart. Nodes that stay keep their credit when others join or leave; who joins has none.

    The weight is ``metadata["weight"]``, a positive number, else ``capacity.max_connections``, at least 1. A weight
    that is no positive number is logged once for each node and does not count.
    """

    def __init__(self) -> None:
        self._turns: Views[_Turns] = Views(self._next_turns)
        self._warned: set[str] = set()

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return the node with the most credit. Raises NoNodeAvailable."""
        return self._turns.of(request, nodes).take()

    def weight(self, node: Node) -> float:
        """The weight of a node by the rule above."""
        text = node.metadata.get(WEIGHT)
        if text is not None:
            weight = _positive(text)
            if weight is not None:
                return weight
            self._warn(node, text)
        return max(1, node.capacity.max_connections)

    def _warn(self, node: Node, text: str) -> None:
        if node.id not in self._warned:
            self._warned.add(node.id)
            logger.warning(
                "weight %r of node %s is not a positive number; its max_connections, %d, counts instead",
                text,
                node.id,
                node.capacity.max_connections,
                extra={"node": node.id},
            )

    def _next_turns(self, nodes: Sequence[Node], previous: _Turns | None) -> _Turns:
        credit = previous.credit_by_id() if previous else {}
        # Sorted, so that equal credits are served in the same order whatever the order of the view.
        ordered = sorted(nodes, key=attrgetter("id"))
        return _Turns(ordered, [self.weight(node) for node in ordered], [credit.get(node.id, 0.0) for node in ordered])


class _Turns:
    """Nodes with their weights and credits, in one order."""

    def __init__(self, nodes: list[Node], weights: list[float], credit: list[float]) -> None:
        self._nodes, self._weights, self._credit = nodes, weights, credit
        self._total = sum(weights)

    def take(self) -> Node:
        """Serve the next node."""
        self._credit = credit = [kept + weight for kept, weight in zip(self._credit, self._weights, strict=True)]
        place = credit.index(max(credit))
        credit[place] -= self._total
        return self._nodes[place]

    def credit_by_id(self) -> dict[str, float]:
        return {node.id: credit for node, credit in zip(self._nodes, self._credit, strict=True)}


def _positive(text: str) -> float | None:
    """The positive, finite number that ``text`` spells, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
