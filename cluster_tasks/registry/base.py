"""The registry seam: which nodes exist, and what they say of themselves.

A registry answers *who exists*. Who may *work* is decided by the epoch table in the broker's Redis
(``cluster_tasks.broker.epochs``): where the two disagree, the epoch table wins.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Any, Protocol

from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.model import EventType, Load, Node, NodeEvent, NodeFilter, NodeStatus

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""About how long a watch waits before it asks a registry again that did not answer."""
ALL = NodeFilter()
BEATEN = {"load", "last_seen"}
"""Fields that every beat renews; watchers are not told of them."""


class Registry(Protocol):
    """A service registry. Every method raises RegistryUnavailable when the service does not answer.

    An implementation may be used from several threads and, after a fork, from both processes.
    """

    def register(self, node: Node) -> None:
        """Make ``node`` known as it is given, in place of an earlier record of the same id.

        Safe to repeat. A record of another epoch ends the old node and begins a new one.
        """

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        """Renew a node's load, status and ``last_seen``, which is now by the clock of this process.

        Raises NodeNotFound if the node is not registered, so that it registers again.
        """

    def deregister(self, node_id: str, epoch: str) -> None:
        """Forget the node if its record is of ``epoch``; a record of another epoch stays. Safe to repeat."""

    def get(self, node_id: str) -> Node:
        """Return one node. Raises NodeNotFound."""

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """Return the nodes that pass ``where``, sorted by id, in one round trip. Empty means: none registered."""

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """Change the status of a node. Raises NodeNotFound."""

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """Yield what changes until ``stop`` is set: first a ``joined`` for each node that exists, then every change.

        No event is lost between two reads and none is told twice; a node that came and went between two reads
        still yields both. A node that registers with another epoch yields ``left`` of the old node, then ``joined``
        of the new one. An ``updated`` is told for a change of status or of the record, not for a beat and not for
        a record that is registered again unchanged.

        While the registry answers, the iterator blocks for at most a second before it looks at ``stop``. An outage
        raises nothing: the iterator tries again and goes on where it was. If the registry no longer knows what
        happened since then, it tells the difference between the nodes last told and those that exist.
        """

    def erase(self) -> None:
        """Remove all that is kept of the cluster: its nodes, whose watchers are told ``left``, and its history."""

    def close(self) -> None:
        """Release connections. Safe to repeat, also before first use."""


class LastRead:
    """The nodes of the last snapshot, each with what was read of it: lists are read more often than nodes beat."""

    def __init__(self, decode: Callable[..., Node | None]) -> None:
        """``decode`` is given the key of a node and its parts; it returns None for what is to be left out."""
        self._decode = decode
        self._known: dict[Any, tuple[tuple[Any, ...], Node]] = {}

    def nodes(self, read: Mapping[Any, tuple[Any, ...]]) -> dict[str, Node]:
        """Return the nodes by id; ``read`` has what now stands of each, by key. Only what is new is decoded."""
        known, found = self._known, {}
        for key, parts in read.items():
            before = known.get(key)
            node = before[1] if before is not None and before[0] == parts else self._decode(key, *parts)
            if node is not None:
                found[key] = parts, node
        self._known = found
        return {node.id: node for _, node in found.values()}


def changes(before: Mapping[str, Node], after: Mapping[str, Node], at: float) -> Iterator[NodeEvent]:
    """Yield what a watcher is told when the nodes ``before`` have become those ``after``, both by id.

    The events come in the order of the ids and are stamped ``at``, in seconds since 1970.
    """
    for node_id in sorted(before.keys() | after.keys()):
        old, new = before.get(node_id), after.get(node_id)
        same = old is not None and new is not None and old.epoch == new.epoch
        if old is not None and not same:
            yield NodeEvent(type=EventType.LEFT, node=old, timestamp=at)
        if new is not None and not same:
            yield NodeEvent(type=EventType.JOINED, node=new, timestamp=at)
        if old and new and same and old.model_dump(exclude=BEATEN) != new.model_dump(exclude=BEATEN):
            yield NodeEvent(type=EventType.UPDATED, node=new, timestamp=at)


def note_told(told: dict[str, Node], event: NodeEvent) -> None:
    """Keep ``told``, the nodes by id that a watcher believes in, in step with what it is told."""
    if event.type is EventType.LEFT:
        told.pop(event.node.id, None)
    else:
        told[event.node.id] = event.node


def follow(news: Callable[[], Sequence[NodeEvent]], stop: Event) -> Iterator[NodeEvent]:
    """Yield what each call of ``news`` returns until ``stop`` is set. It raises RegistryUnavailable in an outage."""
    lost = False
    while not stop.is_set():
        try:
            events = news()
        except RegistryUnavailable as exc:
            if not lost:
                logger.warning("registry lost, the watch goes on when it answers", extra={"reason": str(exc)})
            lost = True
            # Not all at once, when it is back.
            stop.wait(random.uniform(0.5, 1.5) * RETRY_S)
            continue
        if lost:
            logger.info("registry answers again")
            lost = False
        for event in events:
            if stop.is_set():
                return
            yield event
