"""Putting messages on lists, each move one script."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, cast

import redis

from cluster_tasks.broker.hedging import Hedge
from cluster_tasks.broker.message import Placement, job_of
from cluster_tasks.broker.publishing import REMEMBERED_S, Publish
from cluster_tasks.broker.sequels import Sequel
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import RememberedScript, ScriptCall, load_script, run_script, script_source, text

_PACKAGE = "cluster_tasks.broker"
MOVED = "moved_"
"""What the counters of moved jobs begin with; a Why follows."""
UNDECODABLE_KEPT = 1_000
"""How many messages that nobody could read are kept for inspection."""
CRASHES_LIVE_S = 7 * 24 * 3600
"""How long it is remembered that a job was running when a process died, if it comes to no end."""

FOLLOWED_LIVES_S = 24 * 3600
"""How long it is remembered what has followed a job that comes to no end."""


def placing_script(name: str) -> str:
    """Return the source of a script that uses the shared functions that place jobs, now, later or twice."""
    return "\n".join(script_source(_PACKAGE, part) for part in ("placing", "delaying", "hedging", name))


def fetching_script() -> str:
    """Return the source of the script with which a node fetches."""
    return "\n".join((script_source(_PACKAGE, "letting_go"), placing_script("fetch")))


def let_go_arguments(keys: Keys, done: Mapping[str, str]) -> list[str]:
    """Return what the scripts take that let go of deliveries; ``done``: ids of their jobs by tag, '' for none."""
    return [
        part
        for tag, job_id in done.items()
        for part in (tag, *((keys.terminal(job_id), keys.kept_end(job_id)) if job_id else ("", "")))
    ]


class Why(StrEnum):
    """Why jobs are moved that had a place: what they are counted under."""

    FAILOVER = "failover"
    """Their node was lost."""
    DRAIN = "drain"
    """Their node takes nothing new, or leaves."""
    EJECTION = "ejection"
    """Their node does its jobs worse than the others."""
    REBALANCE = "rebalance"
    """Their list was too long."""
    ORPHAN = "orphan"
    """They were found where no epoch stands."""
    REQUEUE = "requeue"
    """Their node could not run or end them, and gave them back."""

    @property
    def counter(self) -> str:
        """Its field among the counters."""
        return f"{MOVED}{self.value}"


@dataclass(frozen=True, slots=True)
class Crash:
    """One crash delivery: what died while the job ran."""

    node: str
    epoch: str
    reason: str
    at: float
    """Seconds since 1970, by the clock of whoever noticed it."""
    traceback: str = ""
    """Of the error that ended the process, where one is known; its end, if it is long."""
    received_since: bool = False
    """Whether a node has taken the job in again after that, and has not begun it."""
    shared: bool = False
    """Whether it was at work with others of its message, any of which may be to blame."""

    @classmethod
    def read(cls, record: bytes | str) -> Crash:
        """Read what ``str`` wrote."""
        return cls(**json.loads(record))

    def __str__(self) -> str:
        return json.dumps(asdict(self))


class Placer:
    """Places and moves messages. Errors of Redis pass through: Kombu and the callers each have their own policy."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self.client, self._keys = client, keys
        self._place = RememberedScript(client, placing_script("place"))
        self._publish = RememberedScript(client, placing_script("publish"))
        self._follow = RememberedScript(client, placing_script("follow"))
        self._move_held = RememberedScript(client, placing_script("move_held"))
        self._move_listed = RememberedScript(client, placing_script("move_listed"))
        self._move_newest = RememberedScript(client, placing_script("move_newest"))
        self._split = RememberedScript(client, placing_script("split"))
        self._unquarantine = RememberedScript(client, placing_script("unquarantine"))
        self._promote = RememberedScript(client, placing_script("promote"))
        self._let_go, self._set_aside = (
            RememberedScript(client, "\n".join(script_source(_PACKAGE, part) for part in ("letting_go", name)))
            for name in ("let_go", "set_aside")
        )
        self._hold_back = load_script(client, _PACKAGE, "hold_back")
        self.index = [keys.epochs, keys.draining, keys.backlog, keys.idle, keys.serves, keys.slot_limits]
        """The keys that every placing script begins with."""

    def place(self, placements: Iterable[Placement]) -> list[str]:
        """Put messages on their lists, all in one step; return the list that each went to."""
        arguments = [part for placement in placements for part in placement.arguments()]
        return [text(target) for target in self._place(self.index, [self._keys.bell_prefix, *arguments])]

    def promote(self) -> None:
        """Put jobs whose time has come on their lists, the first hundred, as every node does that fetches."""
        self._promote([*self.index, self._keys.delayed], [self._keys.bell_prefix])

    def publish(
        self, placement: Placement, publish: Publish, due: float | None, longest_wait_s: float,
        hedge: Hedge | None = None,
    ) -> bool:  # fmt: skip
        """Place a message, ``due`` in seconds since 1970 or (None) now; False if this publish was done before.

        Nodes wait ``longest_wait_s`` at their doorbells. What is placed now may be hedged.
        """
        keys = self._keys
        names = [*self.index, keys.delayed, keys.published(publish.producer)]
        when = "" if due is None else due
        arguments = [keys.bell_prefix, publish.number, REMEMBERED_S, when, longest_wait_s, *placement.arguments()]
        if hedge is not None and due is None and placement.job_id:
            names += [keys.hedges(hedge.node_id), keys.hedged(hedge.node_id)]
            arguments += [keys.node_queue(hedge.node_id), hedge.after_s, placement.job_id]
        return bool(run_script(self.client, self._publish, names, arguments))

    def follow(self, placement: Placement, sequel: Sequel, due: float | None, longest_wait_s: float) -> bool:
        """Place a sequel, ``due`` or (None) now, unless it was placed before; False if the delivery does not stand."""
        keys = self._keys
        names = [*self.index, keys.delayed, keys.unacked(sequel.node_id, sequel.epoch)]
        names += [keys.followed(sequel.scope), keys.terminal(placement.job_id), keys.counters]
        when = "" if due is None else due
        arguments: list[Any] = [keys.bell_prefix, sequel.tag, sequel.attempt, FOLLOWED_LIVES_S, when, longest_wait_s]
        return cast(int, self._follow(names, [*arguments, *placement.arguments()])) >= 0

    def move_held(
        self, source: str, not_started: str, held: Iterable[tuple[str, Placement]], why: Why,
        crash: Crash | None = None,
    ) -> ScriptCall:  # fmt: skip
        """Return the call that moves deliveries out of the hash ``source``, and tells how many were still there.

        Those whose tags are not in the set ``not_started`` are charged with ``crash``, if there was one.
        """
        keys = self._keys
        arguments: list[Any] = [keys.bell_prefix, str(crash or ""), CRASHES_LIVE_S, why.counter]
        for tag, placement in held:
            kind = placement.request_type
            arguments += [tag, placement.queue, placement.waiting, keys.suspect_queue(kind)]
            arguments += [keys.crashes(placement.job_id or tag), kind, placement.suffix, placement.message]
        return ScriptCall(self._move_held, [*self.index, source, not_started, keys.counters], arguments)

    def split(
        self, source: str, not_started: str, tag: str, crashes: str, members: Sequence[Placement], crash: Crash | None
    ) -> int:
        """Put the members of a delivery of the hash ``source`` that have not ended in its place, each by itself.

        They are charged with ``crash``, if there was one; ``crashes`` are those of the message. Returns how many there
        were, -1 if the delivery is gone.
        """
        keys = self._keys
        arguments: list[Any] = [keys.bell_prefix, tag, str(crash or ""), CRASHES_LIVE_S]
        for member in reversed(members):
            job_id, kind = member.job_id, member.request_type
            arguments += [keys.terminal(job_id), keys.followed(job_id), keys.crashes(job_id), member.waiting]
            arguments += [keys.suspect_queue(kind), kind, member.suffix, member.message]
        return cast(int, self._split([*self.index, source, not_started, crashes], arguments))

    def let_go(self, source: str, done: Mapping[str, str]) -> None:
        """Let go of deliveries of the hash ``source`` that are done: the ids of their jobs by tag, '' for none."""
        self._let_go([source], let_go_arguments(self._keys, done))

    def hold_back(self, source: str, not_started: str, tags: Collection[str]) -> None:
        """Note in the set ``not_started`` what of the hash ``source`` is not worked on yet, if it stands there."""
        self._hold_back([source, not_started], tags)

    def unquarantine(self, job_id: str, placement: Placement) -> bool:
        """Place a job that is in quarantine, and forget it there; False if it is not any more."""
        arguments = [self._keys.bell_prefix, job_id, *placement.arguments()]
        return bool(self._unquarantine([*self.index, self._keys.quarantine, self._keys.quarantined], arguments))

    def move_listed(self, source: str, queue: str, listed: Sequence[Placement], why: Why) -> ScriptCall:
        """Return the call that moves the head of the list ``source``, part of ``queue`` in the index.

        It tells how many were moved.
        """
        arguments = [part for placement in listed for part in placement.arguments()]
        names = [*self.index, source, self._keys.counters]
        return ScriptCall(self._move_listed, names, [self._keys.bell_prefix, queue, why.counter, *arguments])

    def move_newest(self, source: str, queue: str, first: int, listed: Sequence[Placement]) -> list[str]:
        """Move messages out of the list ``source``, part of ``queue`` in the index; return where those went that were.

        They come in the order in which they would be fetched; the last one was at the index ``first`` when it was read.
        """
        arguments = [part for placement in listed for part in placement.arguments()]
        names, counter = [*self.index, source, self._keys.counters], Why.REBALANCE.counter
        targets: Any = self._move_newest(names, [self._keys.bell_prefix, queue, first, counter, *arguments])
        return [text(target) for target in targets]

    def keep_undecodable(self, message: bytes) -> None:
        """Keep a message that cannot be decoded for inspection; it is in no list any more."""
        with self.client.pipeline() as pipe:
            pipe.lpush(self._keys.undecodable, message)
            pipe.ltrim(self._keys.undecodable, 0, UNDECODABLE_KEPT - 1)
            pipe.execute()

    def set_aside_held(self, source: str, tag: str | bytes, message: bytes) -> None:
        """Keep a message of the hash ``source`` that cannot be decoded for inspection, if it is still there."""
        names = [self._keys.undecodable, source, self._keys.backlog]
        _, *ended = let_go_arguments(self._keys, {"": job_of(message)})
        self._set_aside(names, [message, tag, "", UNDECODABLE_KEPT, *ended])

    def set_aside_listed(self, source: str, queue: str, message: bytes) -> None:
        """The same for the list ``source``, part of ``queue`` in the index."""
        self._set_aside([self._keys.undecodable, source, self._keys.backlog], [message, "", queue, UNDECODABLE_KEPT])
