"""Moving the work of an ended epoch to nodes that live. Every step can be repeated, and done by several at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import redis

from cluster_tasks.broker.message import Placement, replace_message
from cluster_tasks.broker.placement import Crash, Placer, Why
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import BOUND, Keys, node_suffixes, priority_suffixes
from cluster_tasks.redis_store import foreign_errors, text

CHUNK = 100


@dataclass(frozen=True, slots=True)
class Moved:
    """How many jobs found new owners: those that had been fetched and those that only waited."""

    held: int = 0
    listed: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.held + other.held, self.listed + other.listed)

    def __bool__(self) -> bool:
        return bool(self.held or self.listed)


class Evacuation:
    """Moves jobs out of lists and hashes that no living epoch owns. Raises BrokerUnavailable."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys, self._placer = client, keys, Placer(client, keys)

    def move_remains(self, node_id: str, epoch: str, crash: Crash | None = None) -> Moved:
        """Move all that a fence put away, what was held before what was listed.

        What the epoch was at work on is charged with ``crash``, if it was one.
        """
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"evacuating {node_id}"):
            not_started = keys.not_started(node_id, epoch)
            why = Why.DRAIN if crash is None else Why.FAILOVER
            moved = Moved(self._move_hash(keys.remains_unacked(node_id, epoch), not_started, why, crash))
            moved += Moved(listed=self._move_lists(keys.remains(node_id, epoch), why))
            self._client.delete(not_started)
        return moved

    def hand_over(self, node_id: str) -> Moved:
        """Move the list of a node that drains; what it holds stays with it."""
        with foreign_errors(BrokerUnavailable, f"handing over the list of {node_id}"):
            return Moved(listed=self._move_lists(self._keys.node_queue(node_id), Why.DRAIN))

    def hand_back(
        self, node_id: str, epoch: str, crash: Crash | None = None, tags: Collection[str] | None = None
    ) -> Moved:
        """Take what an epoch holds, or the deliveries ``tags`` of it, from its node while the epoch stands.

        The node cannot commit them any more. It has to be draining, or it may be given the same jobs again.
        """
        with foreign_errors(BrokerUnavailable, f"taking back what {node_id} holds"):
            source, not_started = self._keys.unacked(node_id, epoch), self._keys.not_started(node_id, epoch)
            held: dict[bytes, bytes] = cast(Any, self._client.hgetall(source))
            taken = {tag: held[tag] for tag in held if tags is None or text(tag) in tags}
            return Moved(self._move_chunk(source, not_started, taken, Why.DRAIN, crash))

    def hand_over_unbound(self, node_id: str) -> Moved:
        """Move the list of a node that may not take from it; what no other node can run stays."""
        with foreign_errors(BrokerUnavailable, f"handing over the list of {node_id}"):
            queue = self._keys.node_queue(node_id)
            moved = (self._move_list(queue, suffix, Why.EJECTION) for suffix in priority_suffixes())
            return Moved(listed=sum(moved))

    def move_orphans(self) -> Moved:
        """Move what belongs to no epoch that stands, and forget what no table of epochs knows any more.

        Epochs are looked up in the set of those that were begun, not found by a walk over all keys: there may be
        millions, and whoever observes must not be held up. Nothing is missed by that: an epoch is in the set before it
        is given its first job, and a Redis that has lost its last writes is as it was at one moment before, so what it
        still has of an epoch is not without the name.
        """
        keys, moved = self._keys, Moved()
        with foreign_errors(BrokerUnavailable, "looking for orphans"):
            # Read before the epochs that stand: one that is none of them was ended, never just begun.
            opened: Any = self._client.smembers(keys.opened)
            listed: Any = self._client.zrange(keys.backlog, 0, -1)
            queues = [text(queue) for queue in listed]
            with self._client.pipeline() as pipe:
                pipe.hgetall(keys.epochs)
                pipe.hkeys(keys.fenced)
                epochs, fenced = pipe.execute()
            standing = {text(queue): text(epoch) for queue, epoch in epochs.items()}
            # Of those that were fenced what they held is put away, and their notes are needed still.
            for name in map(text, opened - set(fenced)):
                node_id, _, epoch = name.rpartition("/")
                if standing.get(keys.node_queue(node_id)) != epoch:
                    not_started = keys.not_started(node_id, epoch)
                    moved += Moved(self._move_hash(keys.unacked(node_id, epoch), not_started, Why.ORPHAN))
                    self._client.delete(not_started)
                    self._client.srem(keys.opened, name)
            for queue in queues:
                node_id = keys.node_of(queue) or ""
                if node_id and keys.node_queue(node_id) not in standing:
                    moved += Moved(listed=self._move_lists(keys.node_queue(node_id), Why.ORPHAN))
        return moved

    def _move_hash(self, source: str, not_started: str, why: Why, crash: Crash | None = None) -> int:
        moved = 0
        while self._client.hlen(source):
            scan = self._client.hscan_iter(source, count=CHUNK)
            while chunk := dict(islice(scan, CHUNK)):
                moved += self._move_chunk(source, not_started, chunk, why, crash)
        return moved

    def _move_chunk(
        self, source: str, not_started: str, chunk: dict[bytes, bytes], why: Why, crash: Crash | None
    ) -> int:
        # Each goes to the front, so the one that was fetched first comes last.
        newest_first = sorted(chunk.items(), key=_fetched, reverse=True)
        # A crash tells as much; without one the message has to say that its job may have begun.
        idle: Any = self._client.smembers(not_started) if crash is None else chunk.keys()
        held = list(self._readable(source, newest_first, idle))
        return self._placer.move_held(source, not_started, held, why, crash) if held else 0

    def _readable(
        self, source: str, fields: Iterable[tuple[bytes, bytes]], idle: Collection[bytes]
    ) -> Iterator[tuple[str, Placement]]:
        for tag, message in fields:
            try:
                yield text(tag), replace_message(message, self._keys, delivered=True, interrupted=tag not in idle)
            except ValueError:
                self._placer.set_aside_held(source, tag, message)

    def _move_lists(self, base: str, why: Why) -> int:
        return sum(self._move_list(base, suffix, why) for suffix in node_suffixes())

    def _move_list(self, base: str, suffix: str, why: Why) -> int:
        source, queue = base + suffix, base + (BOUND if suffix.startswith(BOUND) else "")
        moved = 0
        while messages := cast(list[bytes], self._client.lrange(source, -CHUNK, -1)):
            placements = []
            for message in reversed(messages):
                try:
                    placements.append(replace_message(message, self._keys, delivered=False))
                except ValueError:
                    break
            if placements:
                moved += self._placer.move_listed(source, queue, placements, why)
            else:
                self._placer.set_aside_listed(source, queue, messages[-1])
        return moved


def _fetched(field: tuple[bytes, bytes]) -> list[bytes]:
    """The place of a delivery among those of its epoch: the numbers at the end of its tag, comparable as text."""
    return [part.zfill(20) for part in field[0].split(b".")]
