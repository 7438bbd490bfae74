"""The epoch table: which incarnation of each node may work. It decides; a registry only tells who exists."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import redis

from cluster_tasks.errors import BrokerUnavailable, NodeNotFound
from cluster_tasks.keys import ANY_TYPE, Keys, node_suffixes
from cluster_tasks.redis_store import ScriptCall, foreign_errors, load_script, run_together, text

Event = Mapping[str, str | float]
"""Fields of an entry in the event stream."""
MAX_EVENTS = 10_000
"""How many the stream keeps, about."""
_PACKAGE = "cluster_tasks.broker"
LOST_LIVES_S = 24 * 3600
"""For so long it is remembered that a node was lost."""


class Standing(StrEnum):
    """How an epoch stands."""

    OK = "ok"
    DRAINING = "draining"
    FENCED = "fenced"


class Ending(StrEnum):
    """How an epoch ended."""

    LOST = "lost"
    """It stopped beating: what it was working on is charged with a crash."""
    CLOSED = "closed"
    """Its node left in good order: nobody is charged."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What an observer sees of a node: which epoch, and how often it has beaten."""

    epoch: str
    counter: int


class Pulse(NamedTuple):
    """What a node learns when it beats."""

    standing: Standing
    observers: int = 0
    """How many observe all nodes now."""
    revoked: str = ""
    """Another word as soon as jobs are revoked."""


@dataclass(frozen=True, slots=True)
class Predecessor:
    """An epoch that stands under the name that a node wants to take."""

    beat: Beat


class Phase(StrEnum):
    """Why a node has a limit."""

    RECOVERING = "recovering"
    """It was lost and came back: it has to beat a few times."""
    EJECTED = "ejected"
    """It does its jobs worse than the others."""
    HALF_OPEN = "half-open"
    """It was ejected, and its next job is a probe."""
    PROBING = "probing"
    """It was given a probe."""
    RAMPING = "ramping"
    """It has passed its probes, and is given more and more."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How many jobs a node may hold, and why no more."""

    slots: int
    phase: Phase
    trial: str = ""
    """What tells the jobs that are given under it, and its successors, from those before."""
    probes: int = 0
    """How many jobs were given as probes."""

    @classmethod
    def read(cls, value: bytes | str) -> Limit:
        """Read what stands in the hash of limits."""
        slots, phase, trial, *probes = text(value).split(" ")
        return cls(int(slots), Phase(phase), trial, *map(int, probes))

    def __str__(self) -> str:
        return f"{self.slots} {self.phase} {self.trial} {self.probes}"


class Fenced(NamedTuple):
    """An epoch that has ended and whose remains are not yet moved."""

    node_id: str
    epoch: str
    ending: Ending
    held: int
    """Jobs that it had fetched when it ended."""
    listed: int
    """Jobs that waited in its lists."""


@dataclass(frozen=True, slots=True)
class Lists:
    """How the lists of the cluster stand, by list name."""

    lengths: Mapping[str, int]
    """Jobs that wait, those of nodes and the waiting lists. Empty lists are left out."""
    draining: Collection[str]
    """Lists of nodes on which nothing new is placed."""
    limits: Mapping[str, Limit]
    """Of nodes that may not hold what their pool can run, by list."""

    def may_get(self, queue: str) -> bool:
        """Whether jobs may be placed on the list of a node that stands."""
        limit = self.limits.get(queue)
        return queue not in self.draining and (limit is None or limit.phase is Phase.RAMPING)


class EpochTable:
    """Begins, beats, drains and ends epochs. Every method raises BrokerUnavailable when Redis does not answer.

    An ``event`` is what the event stream is told in the same step, if the step is done; see ``EventLog.entry``.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._open = load_script(client, _PACKAGE, "open_epoch")
        self._beat = load_script(client, _PACKAGE, "beat")
        self._fence = load_script(client, _PACKAGE, "fence")
        self._forget = load_script(client, _PACKAGE, "forget_epoch")
        self._drain = load_script(client, _PACKAGE, "set_draining")
        self._limit = load_script(client, _PACKAGE, "limit")

    def open(
        self, node_id: str, serves: Iterable[str], tasks: Iterable[str] = (), recovery_threshold: int = 0,
        zone: str = "",
    ) -> str | Predecessor:  # fmt: skip
        """Begin an epoch and return it, or return the predecessor that stands under this name.

        ``tasks`` are the names of those that the node knows. One that was lost gets no jobs before it has beaten
        ``recovery_threshold`` times. Idle nodes of its ``zone`` are rung before others for what waits in its list.
        """
        keys = self._keys
        types = "," + ",".join(sorted({*serves, ANY_TYPE})) + ","
        arguments: list[str | float] = [keys.node_queue(node_id), secrets.token_hex(6), types, "\n".join(sorted(tasks))]
        arguments += [recovery_threshold, node_id, zone]
        with foreign_errors(BrokerUnavailable, f"registering {node_id}"):
            status, epoch, *counter = self._open(
                [keys.epochs, keys.beats, keys.serves, keys.draining, keys.epoch_counter, keys.tasks, keys.slot_limits]
                + [keys.lost(node_id), keys.opened],
                arguments,
            )
        if text(status) == "opened":
            return text(epoch)
        return Predecessor(Beat(text(epoch), int(counter[0])))

    def beat(self, node_id: str, epoch: str, *, at_bell: bool = False) -> Pulse:
        """Raise the beat counter; tells how the epoch stands.

        One that waits ``at_bell`` is rung if it may have been missed.
        """
        keys = self._keys
        names = [keys.epochs, keys.beats, keys.draining, keys.slot_limits, keys.idle, keys.backlog, keys.watchers]
        names += [keys.revoked, keys.revoked_stamps, keys.delayed, keys.bell(node_id)]
        with foreign_errors(BrokerUnavailable, f"heartbeat of {node_id}"):
            standing, observers, revoked = self._beat(names, [keys.node_queue(node_id), epoch, int(at_bell)])
        return Pulse(Standing(text(standing)), int(observers), text(revoked))

    def beats(self) -> dict[str, Beat]:
        """Return epoch and beat counter of every node that may work, by node id, in one round trip."""
        with foreign_errors(BrokerUnavailable, "reading heartbeats"), self._client.pipeline() as pipe:
            pipe.hgetall(self._keys.epochs)
            pipe.hgetall(self._keys.beats)
            epochs, counters = pipe.execute()
        found = {}
        for queue, epoch in epochs.items():
            node_id = self._keys.node_of(text(queue))
            if node_id is not None:
                found[node_id] = Beat(text(epoch), int(counters.get(queue, 0)))
        return found

    def look_at(self, node_id: str) -> tuple[Beat, bool] | None:
        """Return the beat of a node and whether it is draining, in one round trip; None: no epoch of it stands."""
        queue = self._keys.node_queue(node_id)
        with foreign_errors(BrokerUnavailable, f"looking at {node_id}"), self._client.pipeline() as pipe:
            pipe.hget(self._keys.epochs, queue)
            pipe.hget(self._keys.beats, queue)
            pipe.sismember(self._keys.draining, queue)
            epoch, counter, drains = pipe.execute()
        return None if epoch is None else (Beat(text(epoch), int(counter or 0)), bool(drains))

    def fence(self, node_id: str, seen: Beat, event: Event = MappingProxyType({})) -> bool:
        """End an epoch, unless it has beaten since it was ``seen``; False if it has, or had ended. Safe to repeat."""
        return self.fence_all([(node_id, seen, event)])[0]

    def fence_all(self, silent: Sequence[tuple[str, Beat, Event]]) -> list[bool]:
        """The same for many, given by node id, as each was seen, and event; in as many round trips as for one."""
        with foreign_errors(BrokerUnavailable, f"fencing {', '.join(node_id for node_id, *_ in silent)}"):
            calls = [self._end(name, seen.epoch, str(seen.counter), Ending.LOST, event) for name, seen, event in silent]
            return [bool(ended) for ended in run_together(self._client, calls)]

    def close(self, node_id: str, epoch: str, event: Event = MappingProxyType({})) -> bool:
        """End an epoch in good order, whether it beats or not; False if it had ended. Safe to repeat."""
        with foreign_errors(BrokerUnavailable, f"closing an epoch of {node_id}"):
            return bool(self._end(node_id, epoch, "", Ending.CLOSED, event).run())

    def _end(self, node_id: str, epoch: str, counter: str, ending: Ending, event: Event) -> ScriptCall:
        keys, queue, suffixes = self._keys, self._keys.node_queue(node_id), node_suffixes()
        names = [keys.epochs, keys.beats, keys.serves, keys.draining, keys.backlog, keys.idle, keys.fenced]
        names += [keys.unacked(node_id, epoch), keys.remains_unacked(node_id, epoch), keys.bell(node_id)]
        names += [keys.tasks, keys.suspects_held, keys.slot_limits, keys.lost(node_id), keys.events]
        names.append(keys.counters)
        arguments: list[str | float] = [queue, epoch, counter, f"{node_id}/{epoch}", ending]
        arguments += [keys.remains(node_id, epoch), LOST_LIVES_S if ending is Ending.LOST else 0]
        arguments += [MAX_EVENTS, len(suffixes), *suffixes, *chain(*event.items())]
        return ScriptCall(self._fence, names, arguments)

    def fenced(self) -> list[Fenced]:
        """Return the epochs that have ended and are not forgotten, sorted by node id and epoch."""
        with foreign_errors(BrokerUnavailable, "reading fenced epochs"):
            found: Any = self._client.hgetall(self._keys.fenced)
        return sorted(_read_fenced(text(member), text(ended)) for member, ended in found.items())

    def forget(self, events: Mapping[tuple[str, str], Event]) -> list[bool]:
        """Forget epochs whose remains are moved, by node id and epoch; False where another was first. Safe to repeat.

        However many they are, it takes as many round trips as for one.
        """
        keys = self._keys
        calls = [
            ScriptCall(
                self._forget,
                [keys.fenced, keys.events, keys.opened, keys.not_started(node_id, epoch)],
                [f"{node_id}/{epoch}", MAX_EVENTS, *chain(*event.items())],
            )
            for (node_id, epoch), event in events.items()
        ]
        with foreign_errors(BrokerUnavailable, f"forgetting epochs of {', '.join(node_id for node_id, _ in events)}"):
            return [bool(forgotten) for forgotten in run_together(self._client, calls)]

    def knowing(self, task: str, request_type: str) -> list[str]:
        """Return the ids of the nodes that know a task, serve its type and may be given jobs, sorted.

        Those that have a limit are among them only if there are no others: they will be back.
        """
        with foreign_errors(BrokerUnavailable, f"looking for who knows {task!r}"), self._client.pipeline() as pipe:
            pipe.hgetall(self._keys.tasks)
            pipe.hgetall(self._keys.serves)
            pipe.smembers(self._keys.draining)
            pipe.hgetall(self._keys.slot_limits)
            known, serves, draining, limits = pipe.execute()
        able = {
            queue: self._keys.node_of(text(queue))
            for queue, names in known.items()
            if task in text(names).split("\n")
            and f",{request_type}," in text(serves.get(queue, ""))
            and queue not in draining
        }
        out = {queue for queue, limit in limits.items() if Limit.read(limit).phase is not Phase.RAMPING}
        return sorted(filter(None, [able[queue] for queue in able.keys() - out] or able.values()))

    def set_draining(self, node_id: str, draining: bool, epoch: str = "") -> None:
        """Stop or resume placing jobs on a node. Raises NodeNotFound if ``epoch`` ('': any) of it does not stand."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"draining {node_id}"):
            done = self._drain([keys.epochs, keys.draining], [keys.node_queue(node_id), epoch, int(draining)])
        if not done:
            raise NodeNotFound(node_id, self.beats())

    def limit(
        self, node_id: str, epoch: str, seen: Limit | None, wanted: Limit | None, *, if_half_stay: bool | None = None
    ) -> bool:
        """Set, change or (None) lift the limit of a node; False if its epoch or its limit is not as ``seen`` any more.

        ``if_half_stay``: it is done only if at least half of the nodes, and of those of each type that this one serves,
        stay when it is out; or (False) only if they do not.
        """
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"limiting {node_id}"):
            done = self._limit(
                [keys.epochs, keys.draining, keys.idle, keys.serves, keys.slot_limits],
                [
                    keys.node_queue(node_id),
                    epoch,
                    str(seen or ""),
                    str(wanted or ""),
                    "" if if_half_stay is None else int(if_half_stay),
                ],
            )
        return int(done) == 1

    def lists(self) -> Lists:
        """Return how long the lists are and which take nothing new, or not all they could, in one round trip."""
        with foreign_errors(BrokerUnavailable, "reading queue lengths"), self._client.pipeline() as pipe:
            pipe.zrange(self._keys.backlog, 0, -1, withscores=True)
            pipe.smembers(self._keys.draining)
            pipe.hgetall(self._keys.slot_limits)
            listed, draining, limits = pipe.execute()
        lengths = {text(queue): int(length) for queue, length in listed}
        return Lists(
            lengths,
            frozenset(map(text, draining)),
            {text(queue): Limit.read(value) for queue, value in limits.items()},
        )

    def lengths(self) -> Mapping[str, int]:
        """Return how many jobs wait, by list name."""
        return self.lists().lengths


def _read_fenced(member: str, ended: str) -> Fenced:
    node_id, _, epoch = member.rpartition("/")
    ending, held, listed = ended.split()
    return Fenced(node_id, epoch, Ending(ending), int(held), int(listed))
