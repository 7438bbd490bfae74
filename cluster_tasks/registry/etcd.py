"""The registry in etcd: two keys for each node, under a lease that its beats keep alive.

Below ``/<prefix>/<cluster>/`` a node has ``nodes/<id>``, what rarely changes, and ``loads/<id>``, what every beat
renews. When a node ends, ``past/<id>`` takes its last state in the transaction that removes it or puts another in its
place; ``nodes`` and ``past`` are neighbours, so that one watch covers both and no beat wakes it. ``mark`` is random
and as old as the first node: by it a watch knows the store from another one at the same address.

A lease that has run out takes the node with it, and watchers are told that it left. Every beat makes a revision of
the store: etcd must be started with ``--auto-compaction-retention``, as Kubernetes does, or it fills up.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from threading import Event

from cluster_tasks.addresses.etcd import parse_etcd_url
from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.clock import Clock, SystemClock
from cluster_tasks.errors import ConfigurationError, NodeNotFound, RegistryUnavailable
from cluster_tasks.etcd_store import (
    EtcdStore,
    KeyValue,
    LeaseExpired,
    Operation,
    delete,
    put,
    put_if_missing,
    read,
    unchanged,
)  # fmt: skip
from cluster_tasks.keys import Keys
from cluster_tasks.model import Load, Node, NodeEvent, NodeFilter, NodeStatus
from cluster_tasks.registry.base import ALL, BEATEN, LastRead, follow
from cluster_tasks.registry.etcd_watch import Following, Place, Snapshot

logger = logging.getLogger(__name__)

KINDS = frozenset({"loads", "mark", "nodes", "past"})
RENEWALS = 5
"""How often, in the time that a lease lasts, a node that beats keeps it alive."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A node as it stood when its record was changed by ``revision``."""

    node: Node
    revision: int
    lease: int
    renewed_s: float = -inf
    """When this process last kept the lease alive, by the clock of the machine."""


class EtcdRegistry:
    """A ``Registry`` in etcd 3.4 or later, shared by all processes that use the same prefix and cluster name."""

    def __init__(self, url: SecretUrl | str, keys: Keys, clock: Clock) -> None:
        """Use the etcd at ``url``. Does no I/O. Raises ConfigurationError."""
        address = parse_etcd_url(url)
        if taken := KINDS & {*address.prefix.split("/"), keys.name}:
            # Else the keys of one cluster could be those of another, whose prefix is longer.
            raise ConfigurationError(
                f"{min(taken)!r} cannot be a part of the prefix of registry_url or the name of the cluster: "
                f"in etcd, keys of the registry itself are called {', '.join(sorted(KINDS))}"
            )
        self._store = EtcdStore(address, RegistryUnavailable)
        self._folder, self._ttl_s = f"{address.prefix}/{keys.name}/", address.ttl_s
        # A lease runs by the time of etcd, whatever clock stamps the nodes.
        self._clock, self._lease_clock = clock, SystemClock()
        # What this process wrote last of its nodes, so that a beat need not read first.
        self._beaten: dict[str, _Entry] = {}
        self._unreadable: set[str] = set()
        self._last = LastRead(lambda _, record, load: self._read(record, load))

    def register(self, node: Node) -> None:
        """As ``Registry.register``: a key under a lease of the URL's ``ttl``."""
        while True:
            old, revision = self._find(node.id)
            asked_s = self._lease_clock.monotonic()
            lease = self._store.grant(self._ttl_s)
            then = [
                self._put_record(node, lease),
                self._put_load(node, lease),
                put_if_missing(f"{self._folder}mark", secrets.token_hex(8)),
            ]
            if old and old.node.epoch != node.epoch:
                # First: watchers are told in this order.
                then.insert(0, self._put_past(old.node, lease))
            if changed := self._commit(node.id, revision, then, "registering a node"):
                self._beaten[node.id] = _Entry(node, changed, lease, asked_s)
                return

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        """As ``Registry.beat``: one transaction, in which the record is compared."""
        renewed = {"load": load, "status": status, "last_seen": self._clock.time()}
        entry = self._beaten.get(node_id) or self._find(node_id)[0]
        while entry:
            node = entry.node.model_copy(update=renewed)
            then = [self._put_load(node, entry.lease)]
            if status is not entry.node.status:
                then.append(self._put_record(node))
            if changed := self._commit(node_id, entry.revision, then, "beating"):
                revision = changed if len(then) > 1 else entry.revision
                if kept := self._kept_alive(replace(entry, node=node, revision=revision)):
                    self._beaten[node_id] = kept
                    return
                break
            entry, _ = self._find(node_id)
        self._beaten.pop(node_id, None)
        raise self._not_found(node_id)

    def deregister(self, node_id: str, epoch: str) -> None:
        """As ``Registry.deregister``."""
        while (entry := self._find(node_id)[0]) and entry.node.epoch == epoch:
            then = [
                self._put_past(entry.node, entry.lease),
                delete(f"{self._folder}nodes/{node_id}"),
                delete(f"{self._folder}loads/{node_id}"),
            ]
            if self._commit(node_id, entry.revision, then, "deregistering a node"):
                return

    def get(self, node_id: str) -> Node:
        """As ``Registry.get``."""
        entry, _ = self._find(node_id)
        if entry is None:
            raise self._not_found(node_id)
        return entry.node

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """As ``Registry.list``."""
        return [node for _, node in sorted(self._snapshot().nodes.items()) if where.matches(node)]

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """As ``Registry.set_status``."""
        while entry := self._find(node_id)[0]:
            then = [self._put_record(entry.node.model_copy(update={"status": status}))]
            if status is entry.node.status or self._commit(node_id, entry.revision, then, "setting a status"):
                return
        raise self._not_found(node_id)

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        """As ``Registry.watch``, from the revision that was read on."""
        following = Following(self._store, self._folder, self._snapshot, self._read, self._clock)
        try:
            yield from follow(following.news, stop)
        finally:
            following.close()

    def erase(self) -> None:
        """As ``Registry.erase``."""
        self._beaten.clear()
        # Not all of the cluster: its locks are its neighbours.
        folders = [delete(f"{self._folder}{kind}/", f"{self._folder}{kind}0") for kind in ("loads", "nodes", "past")]
        self._store.commit([], [delete(f"{self._folder}mark"), *folders], "erasing the nodes")

    def close(self) -> None:
        """As ``Registry.close``."""
        self._store.close()

    def _find(self, node_id: str) -> tuple[_Entry | None, int]:
        """Return a node, if it exists and its record is readable, and the revision of its record; 0: there is none."""
        wanted = [read(f"{self._folder}nodes/{node_id}"), read(f"{self._folder}loads/{node_id}")]
        records, loads = self._store.commit([], wanted, "reading a node").found
        if not records:
            return None, 0
        node = self._read(records[0], loads[0] if loads else None)
        revision = records[0].modified
        return (_Entry(node, revision, records[0].lease) if node else None), revision

    def _kept_alive(self, entry: _Entry) -> _Entry | None:
        """Keep the lease alive if it is time; None: it has run out."""
        asked_s = self._lease_clock.monotonic()
        if asked_s - entry.renewed_s < self._ttl_s / RENEWALS:
            return entry
        return replace(entry, renewed_s=asked_s) if self._store.keep_alive(entry.lease) else None

    def _snapshot(self) -> Snapshot:
        """Return all nodes, in one round trip."""
        # From loads over mark to nodes.
        wanted = read(f"{self._folder}loads/", f"{self._folder}nodes0")
        reply = self._store.commit([], [wanted], "listing the nodes")
        found: dict[str, dict[str, KeyValue]] = {"loads": {}, "mark": {}, "nodes": {}}
        for each in reply.found[0]:
            kind, _, node_id = each.key.removeprefix(self._folder).partition("/")
            found.setdefault(kind, {})[node_id] = each
        nodes = self._last.nodes({name: (record, found["loads"].get(name)) for name, record in found["nodes"].items()})
        mark = found["mark"].get("")
        return Snapshot(nodes, Place(reply.revision, mark.value if mark else None))

    def _commit(self, node_id: str, revision: int, then: Sequence[Operation], doing: str) -> int:
        """Do ``then`` if the record is still that of ``revision``; return the new revision, 0 if it is not."""
        try:
            reply = self._store.commit([unchanged(f"{self._folder}nodes/{node_id}", revision)], then, doing)
        except LeaseExpired:
            return 0
        return reply.revision if reply.succeeded else 0

    def _put_record(self, node: Node, lease: int | None = None) -> Operation:
        return put(f"{self._folder}nodes/{node.id}", self._record(node), lease)

    def _put_past(self, node: Node, lease: int) -> Operation:
        return put(f"{self._folder}past/{node.id}", self._record(node), lease)

    def _put_load(self, node: Node, lease: int) -> Operation:
        return put(f"{self._folder}loads/{node.id}", node.model_dump_json(include=BEATEN), lease)

    def _record(self, node: Node) -> str:
        return json.dumps({"node": node.model_dump(mode="json"), "at": self._clock.time()})

    def _read(self, record: KeyValue, load: KeyValue | None = None) -> Node | None:
        """Return the node, or None with one warning: a record of a newer release must not hide the other nodes."""
        try:
            measured = json.loads(load.value) if load else {}
            return Node.model_validate({**json.loads(record.value)["node"], **measured})
        except (ValueError, KeyError, TypeError) as exc:
            if record.key not in self._unreadable:
                self._unreadable.add(record.key)
                node_id = record.key.rpartition("/")[2]
                logger.warning("node left out, its record is not readable", extra={"node": node_id, "reason": str(exc)})
            return None

    def _not_found(self, node_id: str) -> NodeNotFound:
        wanted = read(f"{self._folder}nodes/", f"{self._folder}nodes0", keys_only=True)
        found = self._store.commit([], [wanted], "listing the nodes").found[0]
        return NodeNotFound(node_id, {each.key.rpartition("/")[2] for each in found} - {node_id})
