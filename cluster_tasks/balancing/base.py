"""The balancer seam: pure choice of a node; clock and random source come in from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from cluster_tasks.errors import NoNodeAvailable
from cluster_tasks.model import Node, Request

T = TypeVar("T")


class Balancer(Protocol):
    """Chooses a node for each request. Not thread-safe: the router holds a lock around it.

    A strategy that has no use for ``update`` or ``record`` inherits them: they do nothing.
    """

    # Without a statement in its body a method of a protocol is abstract to a type checker, not inheritable.

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return one of ``nodes``, all of which may take the request; count it as sent there.

        ``nodes`` is the same object from call to call until the view of the cluster changes, so what is derived
        from it can be kept by identity. Raises NoNodeAvailable if it is empty.
        """

    def update(self, nodes: Sequence[Node]) -> None:
        """Take a fresh view of the cluster: what was sent before is in its counts."""
        return

    def record(self, node_id: str, success: bool, latency_s: float) -> None:
        """Learn how a request on a node ended, and after how many seconds."""
        return


def require_nodes(request: Request, nodes: Sequence[Node]) -> None:
    """Raise NoNodeAvailable if ``nodes`` is empty."""
    if not nodes:
        raise NoNodeAvailable(
            f"no node may take a {request.type!r} job: the balancer was given none. A node qualifies while it is online"
            f" or busy, has the role worker, serves {request.type!r} and is below its max_qps"
        )


class SentCounter:
    """Jobs in flight: those of the snapshot plus those that this process has sent since it was taken."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}

    def add(self, node_id: str) -> None:
        """Count one more job as sent to this node."""
        self._sent[node_id] = self._sent.get(node_id, 0) + 1

    def clear(self) -> None:
        """Forget what was sent: a fresh snapshot counts it."""
        self._sent.clear()

    def in_flight(self, node: Node) -> int:
        """Jobs in flight on one node."""
        return node.in_flight + self._sent.get(node.id, 0)

    def in_flight_each(self, reported: Iterable[tuple[str, int]]) -> list[int]:
        """Jobs in flight on each of many nodes, given as what ``reported_in_flight`` returns, in that order."""
        sent = self._sent.get
        return [count + sent(node_id, 0) for node_id, count in reported]


def reported_in_flight(nodes: Iterable[Node]) -> list[tuple[str, int]]:
    """The id of each node and the jobs in flight that its snapshot speaks of."""
    return [(node.id, node.in_flight) for node in nodes]


class Views(Generic[T]):
    """What a strategy derives from the nodes of a request type, derived anew when that type gets other nodes.

    ``derive`` receives the nodes and what it returned before for the same type, or None.
    """

    def __init__(self, derive: Callable[[Sequence[Node], T | None], T]) -> None:
        self._derive = derive
        self._held: dict[str, tuple[Sequence[Node], T]] = {}

    def of(self, request: Request, nodes: Sequence[Node]) -> T:
        """Return what derives from ``nodes``. Raises NoNodeAvailable if there are none."""
        held = self._held.get(request.type)
        # The nodes are held beside what derives from them, so no other object can get their identity.
        # A list may have changed since; only a tuple has not.
        if held is not None and held[0] is nodes and type(nodes) is tuple:
            return held[1]
        require_nodes(request, nodes)
        derived = self._derive(nodes, None if held is None else held[1])
        self._held[request.type] = (nodes, derived)
        return derived
