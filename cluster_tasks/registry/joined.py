"""The registries of other clusters, read-only: who exists there, and what they carry.

Those nodes work for the Redis of their own cluster. So they are never among the nodes of a ``Registry``: whatever
fences, moves, plans or places has that, and cannot come upon them. Here is nothing that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event
from typing import Protocol

from cluster_tasks.balancing.zones import Carried
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.model import Node, NodeEvent, NodeFilter
from cluster_tasks.registry.base import ALL

OWN = ""
"""Stands for the cluster of the caller, where others have a name."""
POLL_S = 0.5


class RegistryReader(Protocol):
    """What of a ``Registry`` only reads."""

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """Return the nodes that pass ``where``; see ``Registry.list``."""

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """Yield what changes until ``stop`` is set; see ``Registry.watch``."""


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """The nodes of one cluster as its registry tells of them."""

    name: str
    """What it is called here; OWN for the caller's."""
    nodes: Sequence[Node] = ()
    away: str = ""
    """Why its registry could not be read; then there are no nodes, which says nothing about them."""


@dataclass(frozen=True, slots=True)
class JoinedEvent:
    """A change in the set of nodes of one cluster."""

    name: str
    event: NodeEvent


class JoinedRegistries:
    """Registries by the names that their clusters have here; ``open_all`` opens them when they are first asked."""

    def __init__(self, open_all: Callable[[], Mapping[str, RegistryReader]]) -> None:
        self._open_all = open_all
        self._opened: Mapping[str, RegistryReader] | None = None

    def read(self, where: NodeFilter = ALL) -> Sequence[ClusterNodes]:
        """Return what each registry tells, sorted by name. One that does not answer hides no other.

        All are asked at once, so it takes as long as the slowest of them.
        """
        registries = sorted(self.registries.items())
        if not registries:
            return ()
        with ThreadPoolExecutor(len(registries), thread_name_prefix="joined-registry") as asking:
            return tuple(asking.map(lambda each: _nodes_of(each[0], each[1], where), registries))

    def watch(self, stop: Event) -> Iterator[JoinedEvent]:
        """Yield what changes in any of them until ``stop`` is set; of each as ``Registry.watch`` does.

        An outage of one raises nothing and holds up no other.
        """
        told: SimpleQueue[JoinedEvent] = SimpleQueue()
        # Whoever stops reading without setting ``stop`` leaves no thread behind either.
        ended = Event()

        def follow(name: str, registry: RegistryReader) -> None:
            for event in registry.watch(ended):
                told.put(JoinedEvent(name, event))

        registries = self.registries
        with ThreadPoolExecutor(max(1, len(registries)), thread_name_prefix="joined-watch") as pool:
            watches = [pool.submit(follow, *each) for each in registries.items()]
            try:
                while not stop.is_set():
                    try:
                        yield told.get(timeout=POLL_S)
                    except Empty:
                        # An outage ends no watch; what does is an error that must be seen.
                        for watch in watches:
                            if watch.done():
                                watch.result()
            finally:
                ended.set()

    @property
    def registries(self) -> Mapping[str, RegistryReader]:
        """Each by its name."""
        if self._opened is None:
            self._opened = self._open_all()
        return self._opened


def _nodes_of(name: str, registry: RegistryReader, where: NodeFilter) -> ClusterNodes:
    try:
        return ClusterNodes(name, tuple(registry.list(where)))
    except RegistryUnavailable as exc:
        return ClusterNodes(name, away=str(exc))


def where_to_send(request_type: str, own: Sequence[Node], joined: Sequence[ClusterNodes]) -> str:
    """Return the name of the cluster that had better be sent a job of this type, OWN being the caller's.

    It is the caller's own while that has a free slot; else, of those that have one, the one with the largest share of
    its slots free. If none has, the job waits at home, or, where nobody serves it at home, at the least loaded. A
    registry does not know the lists of its cluster, only what nodes hold: a cluster without a free slot may be a
    little behind, or far.
    """
    home = _carried(request_type, own)
    if home.in_flight < home.slots:
        return OWN
    others = {each.name: _carried(request_type, each.nodes) for each in joined}
    able = {name: load.in_flight / load.slots for name, load in sorted(others.items()) if load.slots}
    if not able:
        return OWN
    best = min(able, key=lambda name: able[name])
    return best if able[best] < 1 or not home.slots else OWN


def _carried(request_type: str, nodes: Sequence[Node]) -> Carried:
    return Carried.by(node for node in nodes if node.accepts(request_type))
