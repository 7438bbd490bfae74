"""The registry in Consul: its key-value store holds the truth, its catalog shows the nodes to Consul's own users.

The catalog alone cannot keep what a registry promises: an agent tells the servers of its services some time later,
services that went leave no trace, and what a check says is held back for minutes. So a node is one key,
``<service>/<cluster>/nodes/<id>``, and a service with a check that every beat passes, for the user interface, the
health API and DNS; nothing is read from there.

What happened is a chain: ``events/<number>`` holds an event, an id of its own and that of the event before it,
``head`` the number and the id of the last one. A change of a node, its events and the head are one transaction that
applies only if neither node nor head has changed meanwhile. A watcher waits for another head and reads what is
between; if the chain does not lead on from the event that it read last, because Consul lost it, was set back, or
keeps so many events no longer, it compares the nodes. A beat that changes no status writes the key of its node alone
and wakes no watcher.
"""

from __future__ import annotations

import json
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Event
from typing import Any
from urllib.parse import quote

from cluster_tasks.addresses.consul import ConsulUrl, parse_consul_url
from cluster_tasks.clock import Clock
from cluster_tasks.consul_store import (
    OPERATIONS_AT_MOST,
    ConsulClient,
    Entry,
    Operation,
    encoded,
    foreign_errors,
)
from cluster_tasks.errors import NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import Load, Node, NodeEvent, NodeFilter, NodeStatus
from cluster_tasks.registry.base import ALL, LastRead, changes, follow, note_told
from cluster_tasks.registry.consul_catalog import Catalog

logger = logging.getLogger(__name__)

EVENTS_KEPT = 1_000
"""A watcher that falls back further compares lists."""
WAIT_S = 0.9
"""For a change, in one query. Consul adds up to a sixteenth, so that its clients do not come all at once."""
PAUSE_S = 0.05
"""Between queries that told nothing: one for a key that does not exist wakes with every write to the store."""
ATTEMPTS = 40
CONFLICT_PAUSE_S = 0.005
LONGEST_CONFLICT_PAUSE_S = 0.5

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Link:
    """An event as the chain knows it. The first one comes after number 0, without an id."""

    number: int = 0
    id: str = ""


@dataclass(frozen=True, slots=True)
class _Told:
    """Where a watcher stands in the chain after an event; None: this release cannot read the event."""

    link: _Link
    event: NodeEvent | None


class ConsulRegistry:
    """A ``Registry`` in Consul 1.8 or later, shared by all processes that use the same service and cluster name."""

    def __init__(self, url: ConsulUrl | str, keys: Keys, clock: Clock, *, events_kept: int = EVENTS_KEPT) -> None:
        """Use the agent at the ``consul://`` URL. Does no I/O. Raises ConfigurationError."""
        address = parse_consul_url(url) if isinstance(url, str) else url
        self._client = ConsulClient(address)
        self._catalog = Catalog(self._client, address, keys.name)
        self._clock, self._events_kept = clock, events_kept
        prefix = f"{address.service}/{keys.name}/"
        self._nodes, self._events, self._head = f"{prefix}nodes/", f"{prefix}events/", f"{prefix}head"
        self._may_read, self._may_write = (f'key_prefix "{prefix}" {{ policy = "{p}" }}' for p in ("read", "write"))
        self._written: dict[str, Entry] = {}
        """By id, the records that this process wrote last: a beat need not read what it renews."""
        self._unreadable: set[str] = set()
        self._last = LastRead(lambda key, entry: self._read(key, _decoded(entry)))

    def register(self, node: Node) -> None:
        """As ``Registry.register``; shows the node in the catalog as well."""
        self._write(node.id, lambda _: _fields_of(node))
        self._catalog.show(node)

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        """As ``Registry.beat``: one write, in which the record is compared."""
        renewed = {"load": load.model_dump(mode="json"), "status": status, "last_seen": self._clock.time()}
        node = self._write(node_id, self._renewal(node_id, renewed), self._written.get(node_id))
        if node is not None:
            self._catalog.pass_check(node)

    def deregister(self, node_id: str, epoch: str) -> None:
        """As ``Registry.deregister``; takes the node out of the catalog, too."""

        def leave(fields: Fields | None) -> Fields | None:
            return None if fields is None or fields.get("epoch") == epoch else fields

        if self._write(node_id, leave) is not None:
            return
        self._written.pop(node_id, None)
        self._catalog.remove(node_id)

    def get(self, node_id: str) -> Node:
        """As ``Registry.get``."""
        entry = self._entry(node_id)
        node = self._read(entry.key, _decoded(entry))
        if node is None:
            raise self._not_found(node_id)
        return node

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """As ``Registry.list``."""
        nodes, _ = self._snapshot()
        return [node for _, node in sorted(nodes.items()) if where.matches(node)]

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """As ``Registry.set_status``."""
        self._write(node_id, self._renewal(node_id, {"status": status}))

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """As ``Registry.watch``, by blocking queries."""
        told: dict[str, Node] = {}
        link: _Link | None = None
        index = 0

        def news() -> Sequence[NodeEvent]:
            nonlocal index, link
            index, link, events = self._news(index, link, told)
            for event in events:
                note_told(told, event)
            if not events:
                stop.wait(PAUSE_S)
            return events

        return follow(news, stop)

    def erase(self) -> None:
        """As ``Registry.erase``."""
        for node_id in self._snapshot()[0]:
            self._catalog.remove(node_id)
        self._written.clear()
        with self._unavailable("erasing the nodes", self._may_write):
            # Not all of the cluster: its locks are its neighbours.
            self._client.transact(
                [{"Verb": "delete-tree", "Key": key} for key in (self._nodes, self._events, self._head)]
            )

    def close(self) -> None:
        """As ``Registry.close``."""
        # Connections in use stay: a watch in another thread ends by its stop, not by a torn connection.
        self._client.close()

    def _news(self, index: int, link: _Link | None, told: Mapping[str, Node]) -> tuple[int, _Link, Sequence[NodeEvent]]:
        """Wait up to a second for another head; return the next index, the last link and what happened.

        Without a ``link``, and where the chain does not lead on from it, that is the difference to the nodes ``told``.
        """
        with self._unavailable("watching the nodes", self._may_read):
            answered, entry = self._client.read(self._head, index=index, wait_s=WAIT_S)
        # Consul that was set back counts anew. Index 0 asks without waiting, so it must not come of an answer.
        index = max(answered, 1) if answered >= index else 0
        if link is not None:
            chain = self._chain(link, _link(entry))
            if chain is not None:
                last = chain[-1].link if chain else link
                return index, last, [each.event for each in chain if each.event]
        nodes, link = self._snapshot()
        return index, link, tuple(changes(told, nodes, self._clock.time()))

    def _chain(self, link: _Link, head: _Link) -> Sequence[_Told] | None:
        """Return what comes after ``link`` up to ``head``; None: the chain does not lead from one to the other."""
        if head == link:
            return ()
        if head.number <= link.number or head.number - link.number > self._events_kept:
            return None
        chain: list[_Told] = []
        numbers = range(link.number + 1, head.number + 1)
        for start in range(0, len(numbers), OPERATIONS_AT_MOST):
            part = numbers[start : start + OPERATIONS_AT_MOST]
            with self._unavailable("reading events", self._may_read):
                entries = self._client.transact([_get(self._event_key(number)) for number in part], is_read=True)
            # An event that may not be read is left out of the answer without a word.
            if entries is None or len(entries) < len(part):
                return None
            for number, entry in zip(part, entries, strict=True):
                fields = _decoded(entry)
                if fields is None or fields.get("after") != link.id:
                    return None
                link = _Link(number, fields["id"])
                chain.append(_Told(link, self._event(entry.key, fields)))
        return chain if link == head else None

    def _snapshot(self) -> tuple[dict[str, Node], _Link]:
        """Return the nodes by id and the last event that they contain, in one query."""
        with self._unavailable("listing the nodes", self._may_read):
            # Where there is no head, a query by its prefix finds nothing, and one by its name would fail.
            trees = self._client.transact([_tree(self._nodes), _tree(self._head)], is_read=True)
            entries = {entry.key: entry for entry in trees or ()}
            if self._head not in entries:
                # A tree that may not be read looks empty; a single key does not. What it holds is newer than the nodes.
                self._client.read(self._head)
        head = entries.pop(self._head, Entry(self._head, b"", 0))
        nodes = self._last.nodes({key: (entry,) for key, entry in entries.items() if key.startswith(self._nodes)})
        return nodes, _link(head)

    def _write(
        self, node_id: str, change: Callable[[Fields | None], Fields | None], known: Entry | None = None
    ) -> Node | None:
        """Replace the record of a node by what ``change`` makes of it, and tell what that changes; return the node.

        ``change`` is given and returns None for no record; what it returns as it was given is not written. It is
        called again after a change by others. ``known`` is a record that is tried first, without reading it.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, min(LONGEST_CONFLICT_PAUSE_S, CONFLICT_PAUSE_S * 2**attempt)))
            before, known = known or self._entry(node_id), None
            record = _decoded(before)
            fields = change(record)
            if fields is record:
                return self._read(before.key, record)
            written = self._store(before, fields)
            if written is not None:
                self._written[node_id] = written
                return self._read(written.key, fields)
        raise RegistryUnavailable(
            f"writing node {node_id}: others changed it, or told of others, {ATTEMPTS} times first"
        )

    def _entry(self, node_id: str) -> Entry:
        with self._unavailable("reading a node", self._may_read):
            _, entry = self._client.read(self._key(node_id))
        return entry

    def _store(self, before: Entry, fields: Fields | None) -> Entry | None:
        """Write ``fields`` in place of the record ``before`` and tell what changed; None: others were quicker."""
        old, new = self._read(before.key, _decoded(before)), self._read(before.key, fields)
        value = "" if fields is None else json.dumps(fields, sort_keys=True)
        operations = _deletion(before) if fields is None else (_cas(before, value),)
        events = [*changes({old.id: old} if old else {}, {new.id: new} if new else {}, self._clock.time())]
        with self._unavailable("writing a node", self._may_write):
            if events:
                _, head = self._client.read(self._head)
                operations = (*operations, *self._telling(events, head))
            entries = self._client.transact(operations)
        if entries is None:
            return None
        index = next((entry.index for entry in entries if entry.key == before.key), 0)
        return Entry(before.key, value.encode(), index)

    def _telling(self, events: Sequence[NodeEvent], head: Entry) -> Sequence[Operation]:
        """The operations that add ``events`` to the chain and drop as many old ones."""
        link = _link(head)
        operations = []
        for event in events:
            after, link = link, _Link(link.number + 1, uuid.uuid4().hex)
            told = {"id": link.id, "after": after.id, "type": event.type, "at": event.timestamp}
            text = json.dumps({**told, "node": _fields_of(event.node)}, sort_keys=True)
            operations.append({"Verb": "set", "Key": self._event_key(link.number), "Value": encoded(text)})
            if link.number > self._events_kept:
                operations.append({"Verb": "delete", "Key": self._event_key(link.number - self._events_kept)})
        return _cas(head, json.dumps({"number": link.number, "id": link.id})), *operations

    def _renewal(self, node_id: str, renewed: Fields) -> Callable[[Fields | None], Fields | None]:
        def renew(fields: Fields | None) -> Fields | None:
            if fields is None or self._read(self._key(node_id), fields) is None:
                raise self._not_found(node_id)
            # What a newer release wrote besides stays. It is written also if it is the same: what this process wrote
            # last may not be what stands there.
            return {**fields, **renewed}

        return renew

    def _key(self, node_id: str) -> str:
        # A path that ends in /. or /.. is another one.
        name = node_id.replace(".", "%2E") if node_id in (".", "..") else quote(node_id, safe="@")
        return self._nodes + name

    def _event_key(self, number: int) -> str:
        return f"{self._events}{number:012}"

    def _event(self, key: str, fields: Fields) -> NodeEvent | None:
        node = self._read(key, fields.get("node"))
        try:
            return NodeEvent(type=fields["type"], node=node, timestamp=fields["at"]) if node else None
        except (LookupError, ValueError) as exc:
            self._leave_out(key, exc)
            return None

    def _read(self, key: str, fields: Fields | None) -> Node | None:
        """Return the node, or None with one warning: a record of a newer release must not hide the other nodes."""
        if fields is None:
            return None
        try:
            return Node.model_validate(fields)
        except ValueError as exc:
            self._leave_out(str(fields.get("id", key)), exc)
            return None

    def _leave_out(self, name: str, reason: Exception) -> None:
        if name not in self._unreadable:
            self._unreadable.add(name)
            logger.warning("node left out, its record is not readable", extra={"node": name, "reason": str(reason)})

    def _not_found(self, node_id: str) -> NodeNotFound:
        return NodeNotFound(node_id, self._snapshot()[0].keys() - {node_id})

    def _unavailable(self, doing: str, permission: str) -> AbstractContextManager[None]:
        return foreign_errors(RegistryUnavailable, doing, permission)


def _fields_of(node: Node) -> dict[str, Any]:
    fields = node.model_dump(mode="json")
    # Sets have no order: sorted, the same node is the same text in every process.
    return {**fields, "roles": sorted(fields["roles"]), "serves": sorted(fields["serves"])}


def _decoded(entry: Entry) -> Fields | None:
    """Return the JSON object of an entry; None for no entry, an empty one for what is no object."""
    if not entry.index:
        return None
    try:
        found = json.loads(entry.value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _link(head: Entry) -> _Link:
    fields = _decoded(head)
    if fields is None:
        return _Link()
    try:
        return _Link(int(fields["number"]), str(fields["id"]))
    except (LookupError, TypeError, ValueError):
        raise RegistryUnavailable(f"the key {head.key} of Consul holds something else; remove it") from None


def _get(key: str) -> Operation:
    return {"Verb": "get", "Key": key}


def _tree(prefix: str) -> Operation:
    return {"Verb": "get-tree", "Key": prefix}


def _cas(before: Entry, value: str) -> Operation:
    return {"Verb": "cas", "Key": before.key, "Index": before.index, "Value": encoded(value)}


def _deletion(before: Entry) -> tuple[Operation, ...]:
    # A conditional deletion of what others have deleted already would succeed.
    return {"Verb": "check-index", "Key": before.key, "Index": before.index}, {"Verb": "delete", "Key": before.key}
