"""The epoch table: which incarnation of each node may work. It decides; a registry only tells who exists."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis

from cluster_tasks.errors import BrokerUnavailable, NodeNotFound
from cluster_tasks.keys import ANY_TYPE, Keys, node_suffixes
from cluster_tasks.redis_store import foreign_errors, load_script, text

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
    """Begins, beats, drains and ends epochs. Every method raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._open = load_script(client, _PACKAGE, "open_epoch")
        self._beat = load_script(client, _PACKAGE, "beat")
        self._fence = load_script(client, _PACKAGE, "fence")
        self._drain = load_script(client, _PACKAGE, "set_draining")
        self._limit = load_script(client, _PACKAGE, "limit")

    def open(
        self, node_id: str, serves: Iterable[str], tasks: Iterable[str] = (), recovery_threshold: int = 0
    ) -> str | Predecessor:
        """Begin an epoch and return it, or return the predecessor that stands under this name.

        ``tasks`` are the names of those that the node knows. One that was lost gets no jobs before it has beaten
        ``recovery_threshold`` times.
        """
        keys = self._keys
        types = "," + ",".join(sorted({*serves, ANY_TYPE})) + ","
        with foreign_errors(BrokerUnavailable, f"registering {node_id}"):
            status, epoch, *counter = self._open(
                [keys.epochs, keys.beats, keys.serves, keys.draining, keys.epoch_counter, keys.tasks, keys.slot_limits]
                + [keys.lost(node_id)],
                [keys.node_queue(node_id), secrets.token_hex(6), types, "\n".join(sorted(tasks)), recovery_threshold],
            )
        if text(status) == "opened":
            return text(epoch)
        return Predecessor(Beat(text(epoch), int(counter[0])))

    def beat(self, node_id: str, epoch: str) -> Standing:
        """Raise the beat counter; tells how the epoch stands."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"heartbeat of {node_id}"):
            reply = self._beat(
                [keys.epochs, keys.beats, keys.draining, keys.slot_limits], [keys.node_queue(node_id), epoch]
            )
        return Standing(text(reply))

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

    def fence(self, node_id: str, seen: Beat) -> bool:
        """End an epoch, unless it has beaten since it was ``seen``; False if it has, or had ended. Safe to repeat."""
        return self._end(node_id, seen.epoch, str(seen.counter), Ending.LOST)

    def close(self, node_id: str, epoch: str) -> bool:
        """End an epoch in good order, whether it beats or not; False if it had ended. Safe to repeat."""
        return self._end(node_id, epoch, "", Ending.CLOSED)

    def _end(self, node_id: str, epoch: str, counter: str, ending: Ending) -> bool:
        keys, queue = self._keys, self._keys.node_queue(node_id)
        with foreign_errors(BrokerUnavailable, f"ending an epoch of {node_id}"):
            ended = self._fence(
                [keys.epochs, keys.beats, keys.serves, keys.draining, keys.backlog, keys.idle, keys.fenced]
                + [keys.unacked(node_id, epoch), keys.remains_unacked(node_id, epoch), keys.bell(node_id)]
                + [keys.tasks, keys.suspects_held, keys.slot_limits, keys.lost(node_id)],
                [queue, epoch, counter, f"{node_id}/{epoch}", ending, keys.remains(node_id, epoch)]
                + [LOST_LIVES_S if ending is Ending.LOST else 0, *node_suffixes()],
            )
        return bool(ended)

    def fenced(self) -> list[tuple[str, str, Ending]]:
        """Return node id, epoch and ending of the epochs whose remains are not yet moved."""
        with foreign_errors(BrokerUnavailable, "reading fenced epochs"):
            found: Any = self._client.hgetall(self._keys.fenced)
        ended = sorted((text(member).rpartition("/"), Ending(text(ending))) for member, ending in found.items())
        return [(node_id, epoch, ending) for (node_id, _, epoch), ending in ended]

    def knowing(self, task: str, request_type: str) -> list[str]:
        """Return the ids of the nodes that know a task, serve its type and may be given jobs, sorted."""
        with foreign_errors(BrokerUnavailable, f"looking for who knows {task!r}"), self._client.pipeline() as pipe:
            pipe.hgetall(self._keys.tasks)
            pipe.hgetall(self._keys.serves)
            pipe.smembers(self._keys.draining)
            known, serves, draining = pipe.execute()
        able = [
            self._keys.node_of(text(queue))
            for queue, names in known.items()
            if task in text(names).split("\n")
            and f",{request_type}," in text(serves.get(queue, ""))
            and queue not in draining
        ]
        return sorted(filter(None, able))

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
