"""What changes among the nodes in etcd, told from a stream that may break off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster_tasks.clock import Clock
from cluster_tasks.etcd_store import EtcdStore, KeyValue, Stream, key_value, read
from cluster_tasks.model import EventType, Node, NodeEvent
from cluster_tasks.registry.base import changes

WAIT_S = 1.0
DOING = "watching the nodes"


@dataclass(frozen=True, slots=True)
class Place:
    """How far a watch has come in the history of a store."""

    revision: int
    mark: str | None
    """Of the store; None: it had none yet."""

    def is_in(self, revision: int, mark: KeyValue | None) -> bool:
        """Whether the store of ``mark``, now at ``revision``, still has what followed this place."""
        if self.mark is None:
            # The mark is as old as the first node: where it came later, no node came before.
            return mark is None or mark.created > self.revision
        # A backup that was restored has the mark, and an older revision.
        return mark is not None and mark.value == self.mark and revision >= self.revision


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The nodes by id, and the place at which they were that."""

    nodes: Mapping[str, Node]
    place: Place


@dataclass(slots=True)
class Following:
    """One watch. Where it cannot go on from its place, it tells the difference to the nodes told last."""

    store: EtcdStore
    folder: str
    snapshot: Callable[[], Snapshot]
    read: Callable[[KeyValue], Node | None]
    clock: Clock
    _told: dict[str, Node] = field(default_factory=dict)
    _place: Place | None = None
    _stream: Stream | None = None

    def news(self) -> Sequence[NodeEvent]:
        """Return what happened, after about a second if nothing did. Raises RegistryUnavailable; call it again then."""
        if self._stream is None and not self._opened():
            return self._difference()
        assert self._stream is not None
        try:
            message = self._stream.next(WAIT_S)
        except EOFError:
            is_young = self._stream.age_s < WAIT_S
            self.close()
            if is_young:
                # Where every stream breaks off, opening the next one at once would never end.
                self.store.refuse("the stream broke off at once", DOING)
            return ()
        return self._events_of(message) if message else ()

    def close(self) -> None:
        """End the stream. Safe to repeat, also before first use."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _opened(self) -> bool:
        """Open the stream, unless the store has not what followed our place."""
        if self._place is None:
            return False
        reply = self.store.commit([], [read(f"{self.folder}mark")], DOING)
        mark = next(iter(reply.found[0]), None)
        if not self._place.is_in(reply.revision, mark):
            return False
        self._place = Place(self._place.revision, mark.value if mark else None)
        first, end = f"{self.folder}nodes/", f"{self.folder}past0"
        self._stream = self.store.watch(first, end, self._place.revision + 1, DOING)
        return True

    def _difference(self) -> Sequence[NodeEvent]:
        found = self.snapshot()
        events = tuple(changes(self._told, found.nodes, self.clock.time()))
        self._told, self._place = dict(found.nodes), found.place
        return events

    def _events_of(self, message: Mapping[str, Any]) -> Sequence[NodeEvent]:
        result = message.get("result", {})
        if "error" in message or result.get("canceled"):
            self.close()
            if int(result.get("compact_revision", 0)):
                # What followed our place is gone.
                return self._difference()
            self.store.refuse(str(result.get("cancel_reason") or message.get("error") or "canceled"), DOING)
        events: list[NodeEvent] = []
        for change in result.get("events", ()):
            key = key_value(change["kv"])
            events += self._told_of(key, is_deleted=change.get("type") == "DELETE")
            assert self._place is not None
            self._place = Place(key.modified, self._place.mark)
        return events

    def _told_of(self, key: KeyValue, is_deleted: bool) -> Iterator[NodeEvent]:
        kind, _, node_id = key.key.removeprefix(self.folder).partition("/")
        known = self._told.get(node_id)
        if is_deleted:
            # After its past it is not known any more. Without one, its lease has run out.
            if kind == "nodes" and known:
                yield self._left(known, self.clock.time())
            return
        node = self.read(key)
        if node is None:
            return
        at = _written_at(key, self.clock)
        if kind == "nodes":
            self._told[node_id] = node
            yield from changes({node_id: known} if known else {}, {node_id: node}, at)
        elif known and known.epoch == node.epoch:
            yield self._left(node, at)

    def _left(self, node: Node, at: float) -> NodeEvent:
        del self._told[node.id]
        return NodeEvent(type=EventType.LEFT, node=node, timestamp=at)


def _written_at(key: KeyValue, clock: Clock) -> float:
    with suppress(ValueError, KeyError, TypeError):
        return float(json.loads(key.value)["at"])
    return clock.time()
