"""The registry of a single process: for tests, and for a cluster whose nodes are threads.

After a fork each process goes on with a copy of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Lock
from weakref import WeakSet

from cluster_tasks.clock import Clock
from cluster_tasks.errors import NodeNotFound
from cluster_tasks.model import Load, Node, NodeEvent, NodeFilter, NodeStatus
from cluster_tasks.registry.base import ALL, changes

WAIT_S = 1.0

# One lock for all registries of the process, held across a fork: no child inherits it locked by a thread that it
# does not have, or a change half made.
_lock = Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class MemoryRegistry:
    """A ``Registry`` in the memory of this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        # Weak: a watcher that was dropped without being stopped must not collect events for ever.
        self._inboxes: WeakSet[SimpleQueue[NodeEvent]] = WeakSet()

    def register(self, node: Node) -> None:
        """As ``Registry.register``."""
        with _lock:
            self._put(node)

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        """As ``Registry.beat``."""
        seen_at = self._clock.time()
        with _lock:
            node = self._find(node_id)
            self._put(node.model_copy(update={"load": load, "status": status, "last_seen": seen_at}))

    def deregister(self, node_id: str, epoch: str) -> None:
        """As ``Registry.deregister``."""
        with _lock:
            node = self._nodes.get(node_id)
            if node is not None and node.epoch == epoch:
                del self._nodes[node_id]
                self._tell({node_id: node}, {})

    def get(self, node_id: str) -> Node:
        """As ``Registry.get``."""
        with _lock:
            return self._find(node_id)

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """As ``Registry.list``."""
        with _lock:
            nodes = sorted(self._nodes.items())
        return [node for _, node in nodes if where.matches(node)]

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """As ``Registry.set_status``."""
        with _lock:
            self._put(self._find(node_id).model_copy(update={"status": status}))

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """As ``Registry.watch``."""
        inbox: SimpleQueue[NodeEvent] = SimpleQueue()
        with _lock:
            for event in changes({}, self._nodes, self._clock.time()):
                inbox.put(event)
            self._inboxes.add(inbox)
        while not stop.is_set():
            try:
                event = inbox.get(timeout=WAIT_S)
            except Empty:
                continue
            yield event

    def erase(self) -> None:
        """As ``Registry.erase``."""
        with _lock:
            nodes, self._nodes = self._nodes, {}
            self._tell(nodes, {})

    def close(self) -> None:
        """Do nothing: there is no connection to release."""

    def _find(self, node_id: str) -> Node:
        try:
            return self._nodes[node_id]
        except KeyError:
            raise NodeNotFound(node_id, self._nodes) from None

    def _put(self, node: Node) -> None:
        known = self._nodes.get(node.id)
        self._nodes[node.id] = node
        self._tell({} if known is None else {node.id: known}, {node.id: node})

    def _tell(self, before: Mapping[str, Node], after: Mapping[str, Node]) -> None:
        for event in changes(before, after, self._clock.time()):
            for inbox in self._inboxes:
                inbox.put(event)
