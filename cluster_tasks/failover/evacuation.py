"""Moving the work of an ended epoch to nodes that live. Every step can be repeated, and done by several at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import redis
from redis.client import Pipeline

from cluster_tasks.broker.message import replace_message
from cluster_tasks.broker.placement import Crash, Placer, Why
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import BOUND, Keys, node_suffixes, priority_suffixes
from cluster_tasks.redis_store import ScriptCall, foreign_errors, text

CHUNK = 100
"""Messages that are read and moved at once, of all hashes and lists together: each may be long."""


class Remains(NamedTuple):
    """An epoch that has ended."""

    node_id: str
    epoch: str
    crash: Crash | None = None
    """What is charged with all that it was at work on; None: it ended in good order."""


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

    def move_remains(self, *ended: Remains) -> Moved:
        """Move all that the fences of these epochs put away, what was held before what was listed.

        However many they are, it takes a few round trips, and two more for each hundred messages.
        """
        keys = self._keys
        held: list[_Held] = []
        listed: list[_Listed] = []
        for node_id, epoch, crash in ended:
            why = Why.DRAIN if crash is None else Why.FAILOVER
            source, not_started = keys.remains_unacked(node_id, epoch), keys.not_started(node_id, epoch)
            held.append(_Held(self._placer, keys, source, not_started, why, crash))
            listed += self._lists(keys.remains(node_id, epoch), node_suffixes(), why)
        with foreign_errors(BrokerUnavailable, f"evacuating {', '.join(each.node_id for each in ended)}"):
            return self._empty(held, listed)

    def hand_over(self, node_id: str) -> Moved:
        """Move the list of a node that drains; what it holds stays with it."""
        with foreign_errors(BrokerUnavailable, f"handing over the list of {node_id}"):
            return self._empty(self._lists(self._keys.node_queue(node_id), node_suffixes(), Why.DRAIN))

    def hand_back(
        self, node_id: str, epoch: str, crash: Crash | None = None, tags: Collection[str] | None = None
    ) -> Moved:
        """Take what an epoch holds, or the deliveries ``tags`` of it, from its node while the epoch stands.

        The node cannot commit them any more. It has to be draining, or it may be given the same jobs again.
        """
        with foreign_errors(BrokerUnavailable, f"taking back what {node_id} holds"):
            source = self._held(node_id, epoch, Why.DRAIN, crash)
            with self._client.pipeline() as pipe:
                pipe.hgetall(source.key)
                pipe.smembers(source.not_started)
                held, idle = pipe.execute()
            taken = {tag: held[tag] for tag in held if tags is None or text(tag) in tags}
            call = source.move(source.deliveries(taken, idle))
            return Moved(held=call.run() if call else 0)

    def hand_over_unbound(self, node_id: str) -> Moved:
        """Move the list of a node that may not take from it; what no other node can run stays."""
        with foreign_errors(BrokerUnavailable, f"handing over the list of {node_id}"):
            return self._empty(self._lists(self._keys.node_queue(node_id), priority_suffixes(), Why.EJECTION))

    def move_orphans(self) -> Moved:
        """Move what belongs to no epoch that stands, and forget what no table of epochs knows any more.

        Epochs are looked up in the set of those that were begun, not found by a walk over all keys: there may be
        millions, and whoever observes must not be held up. Nothing is missed by that: an epoch is in the set before it
        is given its first job, and a Redis that has lost its last writes is as it was at one moment before, so what it
        still has of an epoch is not without the name.
        """
        keys = self._keys
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
            orphans: dict[str, _Held] = {}
            for name in map(text, opened - set(fenced)):
                node_id, _, epoch = name.rpartition("/")
                if standing.get(keys.node_queue(node_id)) != epoch:
                    orphans[name] = self._held(node_id, epoch, Why.ORPHAN)
            nodes = filter(None, map(keys.node_of, queues))
            unowned = sorted({keys.node_queue(node_id) for node_id in nodes} - standing.keys())
            lists = chain(*(self._lists(queue, node_suffixes(), Why.ORPHAN) for queue in unowned))
            moved = self._empty([*orphans.values()], [*lists])
            if orphans:
                with self._client.pipeline() as pipe:
                    pipe.delete(*(source.not_started for source in orphans.values()))
                    pipe.srem(keys.opened, *orphans)
                    pipe.execute()
        return moved

    def _held(self, node_id: str, epoch: str, why: Why, crash: Crash | None = None) -> _Held:
        keys = self._keys
        return _Held(self._placer, keys, keys.unacked(node_id, epoch), keys.not_started(node_id, epoch), why, crash)

    def _lists(self, base: str, suffixes: Iterable[str], why: Why) -> list[_Listed]:
        return [
            _Listed(self._placer, self._keys, base + suffix, base + (BOUND if suffix.startswith(BOUND) else ""), why)
            for suffix in suffixes
        ]

    def _empty(self, *stages: Sequence[_Source]) -> Moved:
        """Move all messages out of these, stage after stage, those of one together."""
        with self._client.pipeline(transaction=False) as pipe:
            for source in chain(*stages):
                source.look(pipe)
            answers = pipe.execute()
        full = {source.key for source, answer in zip(chain(*stages), answers, strict=True) if source.note(answer)}
        moves = (self._empty_stage([source for source in stage if source.key in full]) for stage in stages)
        return sum(moves, Moved())

    def _empty_stage(self, left: Sequence[_Source]) -> Moved:
        moved = Moved()
        moves: list[tuple[_Source, ScriptCall]] = []
        while left or moves:
            count = max(1, CHUNK // max(1, len(left)))
            with self._client.pipeline(transaction=False) as pipe:
                for _, move in moves:
                    move.add_to(pipe)
                for source in left:
                    source.ask(pipe, count)
                answers = iter(pipe.execute())
            for source, _ in moves:
                moved += source.moved(next(answers))
            found = [(source, source.take(answers)) for source in left]
            moves = [(source, call) for source, messages in found if messages and (call := source.move(messages))]
            left = [source for source, messages in found if source.may_have_more(messages)]
        return moved


class _Delivery(NamedTuple):
    tag: bytes
    message: bytes
    interrupted: bool
    """Whether its message has to say that the job may have begun. A crash that it is charged with tells as much."""


def _order(tag: bytes) -> list[bytes]:
    """The place of a delivery among those of its epoch: the numbers at the end of its tag, comparable as text."""
    return [part.zfill(20) for part in tag.split(b".")]


@dataclass(slots=True)
class _Held:
    """Deliveries of an epoch: a hash, to which nothing is added."""

    placer: Placer
    keys: Keys
    key: str
    not_started: str
    why: Why
    crash: Crash | None = None
    tags: list[bytes] = field(init=False, default_factory=list)
    """Those that are to be read, in the order in which they were fetched."""
    asked: list[bytes] = field(init=False, default_factory=list)

    def look(self, pipe: Pipeline) -> None:
        pipe.hkeys(self.key)

    def note(self, answer: Any) -> bool:
        """Take in what the look has found; return whether there is anything."""
        self.tags = sorted(answer, key=_order)
        return bool(self.tags)

    def ask(self, pipe: Pipeline, count: int) -> None:
        self.tags, self.asked = self.tags[:-count], self.tags[-count:]
        pipe.hmget(self.key, self.asked)
        pipe.smembers(self.not_started)

    def take(self, answers: Iterator[Any]) -> list[Any]:
        messages, idle = next(answers), next(answers)
        found = zip(self.asked, messages, strict=True)
        return self.deliveries({tag: message for tag, message in found if message is not None}, idle)

    def may_have_more(self, _: Sequence[Any]) -> bool:
        return bool(self.tags)

    def deliveries(self, fields: Mapping[bytes, bytes], idle: Collection[bytes]) -> list[_Delivery]:
        # Each goes to the front, so the one that was fetched first comes last.
        tags = sorted(fields, key=_order, reverse=True)
        return [_Delivery(tag, fields[tag], self.crash is None and tag not in idle) for tag in tags]

    def move(self, deliveries: Iterable[_Delivery]) -> ScriptCall | None:
        """Return the call that moves them; None if nobody can read one of them, and all are set aside."""
        readable = []
        for tag, message, interrupted in deliveries:
            try:
                placement = replace_message(message, self.keys, delivered=True, interrupted=interrupted)
                readable.append((text(tag), placement))
            except ValueError:
                self.placer.set_aside_held(self.key, tag, message)
        return self.placer.move_held(self.key, self.not_started, readable, self.why, self.crash) if readable else None

    def moved(self, count: int) -> Moved:
        return Moved(held=count)


@dataclass(frozen=True, slots=True)
class _Listed:
    """Messages that wait: a list, part of ``queue`` in the index."""

    placer: Placer
    keys: Keys
    key: str
    queue: str
    why: Why

    def look(self, pipe: Pipeline) -> None:
        pipe.llen(self.key)

    def note(self, answer: Any) -> bool:
        return bool(answer)

    def ask(self, pipe: Pipeline, count: int) -> None:
        pipe.lrange(self.key, -count, -1)

    def take(self, answers: Iterator[Any]) -> list[Any]:
        messages: list[bytes] = next(answers)
        # The head of a list is its end.
        return messages[::-1]

    def may_have_more(self, messages: Sequence[Any]) -> bool:
        return bool(messages)

    def move(self, messages: Sequence[bytes]) -> ScriptCall | None:
        """Return the call that moves those before the first that nobody can read; None if there are none.

        That one is set aside when it is the head.
        """
        readable = []
        for message in messages:
            try:
                readable.append(replace_message(message, self.keys, delivered=False))
            except ValueError:
                break
        if readable:
            return self.placer.move_listed(self.key, self.queue, readable, self.why)
        self.placer.set_aside_listed(self.key, self.queue, messages[0])
        return None

    def moved(self, count: int) -> Moved:
        return Moved(listed=count)


_Source = _Held | _Listed
