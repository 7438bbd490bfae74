r"""The registry in Redis: two hashes and a stream.

``nodes`` holds what rarely changes, ``loads`` what every beat renews, so a beat writes little. A value of either is
``<JSON>\n<word>``: scripts compare the word (in ``nodes`` the epoch, in ``loads`` the status) and never read the
JSON, which has no raw newline. Each script writes hash and stream in one step, so a snapshot that is taken together
with the last id of the stream is exact: what comes after that id, and nothing else, is not in the snapshot.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Event
from typing import Any

import redis

from cluster_tasks.clock import Clock
from cluster_tasks.errors import NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import EventType, Load, Node, NodeEvent, NodeFilter, NodeStatus
from cluster_tasks.redis_store import connect, foreign_errors, load_script, text
from cluster_tasks.registry.base import ALL, BEATEN, LastRead, changes, follow, note_told

logger = logging.getLogger(__name__)

EVENTS_KEPT = 10_000
"""About how many events the stream keeps: a watcher that falls back further compares lists."""
READ_AT_MOST = 1_000
BLOCK_MS = 1_000
TOLD_TYPES = frozenset(EventType)
NEVER = "0-0"
"""The id before all that a stream can have."""
ANCHOR = "anchor"
"""Type of an entry that tells nothing: a watcher of an empty stream needs an id to go on from."""


class RedisRegistry:
    """A ``Registry`` in Redis 6.2 or later, shared by all processes that use the same cluster name."""

    def __init__(
        self, store: str | redis.Redis, keys: Keys, clock: Clock, *, events_kept: int = EVENTS_KEPT,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        """Use the Redis at the URL or of the client ``store``. Does no I/O.

        The socket time-out of a client must be above a second, for which ``watch`` blocks. With ``read_only`` watching
        writes nothing; before the first node ever registers, one that comes and goes in a moment may then be missed.
        """
        self._read_only = read_only
        self._client = connect(store) if isinstance(store, str) else store
        self._keys, self._clock, self._events_kept = keys, clock, events_kept
        self._unreadable: set[str] = set()
        self._last = LastRead(lambda key, record, state: self._read(text(key), record, state))
        self._scripts = {
            name: load_script(self._client, "cluster_tasks.registry", name)
            for name in ("register", "beat", "deregister", "set_status")
        }

    def register(self, node: Node) -> None:
        """As ``Registry.register``, in one script."""
        self._run("register", node.id, _record(node), _state(node.load, node.last_seen, node.status))

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        """As ``Registry.beat``, in one script."""
        if not self._run("beat", node_id, _state(load, self._clock.time(), status)):
            raise self._not_found(node_id)

    def deregister(self, node_id: str, epoch: str) -> None:
        """As ``Registry.deregister``, in one script, which compares the epoch."""
        self._run("deregister", node_id, epoch)

    def get(self, node_id: str) -> Node:
        """As ``Registry.get``."""
        with foreign_errors(RegistryUnavailable, "reading a node"), self._client.pipeline() as pipe:
            pipe.hget(self._keys.nodes, node_id)
            pipe.hget(self._keys.loads, node_id)
            record, state = pipe.execute()
        node = self._read(node_id, record, state) if record and state else None
        if node is None:
            raise self._not_found(node_id)
        return node

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """As ``Registry.list``."""
        nodes, _ = self._snapshot()
        return [node for _, node in sorted(nodes.items()) if where.matches(node)]

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """As ``Registry.set_status``, in one script."""
        if not self._run("set_status", node_id, status):
            raise self._not_found(node_id)

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """As ``Registry.watch``, by a stream of what has changed."""
        told: dict[str, Node] = {}
        cursor: str | None = None

        def news() -> Sequence[NodeEvent]:
            nonlocal cursor
            cursor, events = self._news(cursor, told)
            for event in events:
                note_told(told, event)
            return events

        return follow(news, stop)

    def erase(self) -> None:
        """As ``Registry.erase``."""
        with foreign_errors(RegistryUnavailable, "erasing the nodes"):
            self._client.delete(self._keys.nodes, self._keys.loads, self._keys.node_events)

    def close(self) -> None:
        """As ``Registry.close``."""
        # Connections in use stay: a watch in another thread ends by its stop, not by a torn connection.
        self._client.connection_pool.disconnect(inuse_connections=False)

    def _news(self, cursor: str | None, told: Mapping[str, Node]) -> tuple[str | None, Sequence[NodeEvent]]:
        """Return the next cursor and what happened since ``cursor``, after at most a second.

        Without a cursor that still stands in the stream, that is the difference to the nodes ``told``.
        """
        found = cursor and self._events_after(cursor)
        if found:
            return found
        nodes, cursor = self._snapshot()
        if cursor is None and self._read_only:
            # No entry has this id. What is read after it is compared with the nodes.
            cursor = NEVER
        elif cursor is None:
            with foreign_errors(RegistryUnavailable, "watching the nodes"):
                self._client.xadd(self._keys.node_events, {"type": ANCHOR})
        return cursor, tuple(changes(told, nodes, self._clock.time()))

    def _snapshot(self) -> tuple[Mapping[str, Node], str | None]:
        """Return the nodes by id and the id of the last event that they contain; None: there is no event."""
        with foreign_errors(RegistryUnavailable, "listing the nodes"), self._client.pipeline() as pipe:
            pipe.hgetall(self._keys.nodes)
            pipe.hgetall(self._keys.loads)
            pipe.xrevrange(self._keys.node_events, count=1)
            records, states, last = pipe.execute()
        nodes = self._last.nodes({key: (records[key], states[key]) for key in records if key in states})
        return nodes, text(last[0][0]) if last else None

    def _events_after(self, cursor: str) -> tuple[str, Sequence[NodeEvent]] | None:
        """Wait up to a second for events after the id ``cursor``; return the last id read and the events.

        None: the stream no longer holds ``cursor``, so what followed it may be gone, too.
        """
        stream = self._keys.node_events
        with (
            foreign_errors(RegistryUnavailable, "watching the nodes"),
            self._client.pipeline(transaction=False) as pipe,
        ):
            # The first command only waits. The second reads the cursor and what follows it: streams are trimmed
            # from the old end, so while the cursor is there, nothing after it is missing.
            pipe.xread({stream: cursor}, count=1, block=BLOCK_MS)
            pipe.xrange(stream, min=cursor, count=READ_AT_MOST + 1)
            _, entries = pipe.execute()
        if not entries or text(entries[0][0]) != cursor:
            return None
        events = (self._event(fields) for _, fields in entries[1:])
        return text(entries[-1][0]), [event for event in events if event]

    def _run(self, script: str, node_id: str, *args: str) -> Any:
        keys = (self._keys.nodes, self._keys.loads, self._keys.node_events)
        with foreign_errors(RegistryUnavailable, f"registry script {script}"):
            return self._scripts[script](keys, (node_id, self._clock.time(), self._events_kept, *args))

    def _not_found(self, node_id: str) -> NodeNotFound:
        with foreign_errors(RegistryUnavailable, "listing the nodes"):
            known: Iterable[Any] = self._client.hkeys(self._keys.nodes)
        return NodeNotFound(node_id, {text(key) for key in known} - {node_id})

    def _event(self, fields: Mapping[Any, Any]) -> NodeEvent | None:
        entry = {text(name): text(value) for name, value in fields.items()}
        if entry["type"] not in TOLD_TYPES:
            return None
        node = self._read(entry["id"], entry["record"], entry["state"])
        if node is None:
            return None
        return NodeEvent(type=EventType(entry["type"]), node=node, timestamp=float(entry["at"]))

    def _read(self, node_id: str, record: bytes | str, state: bytes | str) -> Node | None:
        """Return the node, or None with one warning: a record of a newer release must not hide the other nodes."""
        try:
            return _node(text(record), text(state))
        except ValueError as exc:
            if node_id not in self._unreadable:
                self._unreadable.add(node_id)
                logger.warning("node left out, its record is not readable", extra={"node": node_id, "reason": str(exc)})
            return None


def _record(node: Node) -> str:
    fields = node.model_dump(mode="json", exclude={"status", *BEATEN})
    # Sets have no order: sorted, the same node is the same text in every process.
    fields["roles"].sort()
    fields["serves"].sort()
    return f"{json.dumps(fields, sort_keys=True)}\n{node.epoch}"


def _state(load: Load, last_seen: float, status: NodeStatus) -> str:
    return f"{json.dumps({'load': load.model_dump(), 'last_seen': last_seen})}\n{status}"


def _node(record: str, state: str) -> Node:
    fields = json.loads(record.partition("\n")[0])
    measured, _, status = state.partition("\n")
    return Node.model_validate({**fields, **json.loads(measured), "status": status})
