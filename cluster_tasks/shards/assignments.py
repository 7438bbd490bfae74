"""What Redis knows of shards: how collections are divided, which nodes are to hold which shards, and which are ready.

The *assignment* is a plan, changed as a whole under its version. That a node is *ready* it says itself, once the shard
is in its memory, and under its epoch: with that, or after a fence, it is void. Both are about speed only. The data lie
where every node reaches them, so a search that goes to another node finds the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from secrets import token_hex
from types import MappingProxyType
from typing import Any, NamedTuple

import redis

from cluster_tasks.broker.epochs import MAX_EVENTS, Event
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text
from cluster_tasks.shards.placement import Shard

EntryOf = Callable[..., Event]
"""Makes an event, as ``EventLog.entry`` does."""
_PACKAGE = "cluster_tasks.shards"


class Division(NamedTuple):
    """How a collection is divided."""

    generation: int
    shards: int


@dataclass(frozen=True, slots=True)
class Assigned:
    """Which nodes are to hold the shards of one generation of a collection."""

    generation: int
    nodes: tuple[tuple[str, ...], ...]
    """By the number of the shard, the primary first."""

    @classmethod
    def read(cls, value: bytes | str) -> Assigned:
        """Read what ``str`` wrote."""
        stored = json.loads(value)
        return cls(stored["generation"], tuple(map(tuple, stored["nodes"])))

    def __str__(self) -> str:
        return json.dumps({"generation": self.generation, "nodes": self.nodes})


@dataclass(frozen=True, slots=True)
class Assignments:
    """Those of all collections."""

    version: str = ""
    """``<number>-<random characters>``: a Redis that lost its last second must not give one twice. Empty: none yet."""
    collections: Mapping[str, Assigned] = field(default_factory=dict)

    def shards_of(self, node_id: str) -> dict[Shard, int]:
        """Return the shards that a node is to hold, each with its generation."""
        return {
            Shard(collection, number): assigned.generation
            for collection, assigned in self.collections.items()
            for number, nodes in enumerate(assigned.nodes)
            if node_id in nodes
        }


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Who is to hold the shards of a collection, and who has them in memory."""

    assigned: Assigned
    ready: tuple[frozenset[str], ...]
    """By the number of the shard; none but nodes whose epochs stand, assigned or not any more."""
    durations_s: Sequence[float] = ()
    """Of the last parts of searches that could be hedged."""


class AssignmentTable:
    """Reads and changes them. Every method raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._assign = load_script(client, _PACKAGE, "assign")
        self._announce = load_script(client, _PACKAGE, "announce")
        self._report = load_script(client, _PACKAGE, "report")
        self._let_go = load_script(client, _PACKAGE, "let_go")

    # How collections are divided.

    def divisions(self) -> dict[str, Division]:
        """Return how the collections that are known are divided."""
        with foreign_errors(BrokerUnavailable, "reading collections"):
            found: Any = self._client.hgetall(self._keys.collections)
        return {text(name): Division(*map(int, value.split())) for name, value in found.items()}

    def announce(self, collection: str, division: Division) -> bool:
        """Tell how a collection is divided; False if that was known, or is out of date."""
        return self._tell(collection, division.generation, division.shards)

    def withdraw(self, collection: str, generation: int) -> bool:
        """Tell that a collection is no more; False if nobody knew it, or a later generation of it is known."""
        return self._tell(collection, generation, 0)

    def _tell(self, collection: str, generation: int, shards: int) -> bool:
        with foreign_errors(BrokerUnavailable, f"announcing collection {collection!r}"):
            return bool(self._announce([self._keys.collections], [collection, generation, shards]))

    # Who is to hold them.

    def read(self) -> Assignments:
        """Return the assignment."""
        with foreign_errors(BrokerUnavailable, "reading the assignment of shards"), self._client.pipeline() as pipe:
            pipe.get(self._keys.shards_version)
            pipe.hgetall(self._keys.shards)
            version, found = pipe.execute()
        return Assignments(text(version or ""), {text(name): Assigned.read(value) for name, value in found.items()})

    def write(
        self, seen: str, changes: Mapping[str, Assigned | None], event: Event = MappingProxyType({})
    ) -> str | None:
        """Change the assignment (None: of a collection that is no more); return the new version.

        None: its version is not ``seen`` any more, and nothing was done. ``event`` is told in the same step.
        """
        keys = self._keys
        version = f"{int(seen.partition('-')[0] or 0) + 1}-{token_hex(4)}"
        told = list(chain(*event.items()))
        changed = chain(*((name, str(assigned or "")) for name, assigned in changes.items()))
        with foreign_errors(BrokerUnavailable, "assigning shards"):
            done = self._assign(
                [keys.shards, keys.shards_version, keys.events], [seen, version, MAX_EVENTS, len(told), *told, *changed]
            )
        return version if done else None

    def glance(self, node_id: str) -> tuple[str, str]:
        """Return the version of the assignment and the epoch of a node, each empty if there is none."""
        with foreign_errors(BrokerUnavailable, "looking for a new assignment"), self._client.pipeline() as pipe:
            pipe.get(self._keys.shards_version)
            pipe.hget(self._keys.epochs, self._keys.node_queue(node_id))
            version, epoch = pipe.execute()
        return text(version or ""), text(epoch or "")

    def claim(self, duty: str, for_s: float) -> bool:
        """Whether the caller is the one who is to do ``duty`` now; nobody else is for so long."""
        with foreign_errors(BrokerUnavailable, f"claiming {duty}"):
            key = self._keys.shards_turn(duty)
            return bool(self._client.set(key, 1, nx=True, px=max(1, int(for_s * 1000))))

    # Who has them in memory.

    def whereabouts(self, collection: str) -> Whereabouts | None:
        """Return where the shards of a collection are, in one round trip; None: they are assigned to nobody."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"looking for {collection!r}"), self._client.pipeline() as pipe:
            pipe.hget(keys.shards, collection)
            pipe.hgetall(keys.shards_ready(collection))
            pipe.hgetall(keys.epochs)
            pipe.lrange(keys.durations(collection), 0, -1)
            stored, reported, epochs, durations = pipe.execute()
        if stored is None:
            return None
        assigned = Assigned.read(stored)
        ready: list[set[str]] = [set() for _ in assigned.nodes]
        for generation, number, node_id, epoch in _read_ready(reported):
            stands = epochs.get(keys.node_queue(node_id).encode()) == epoch
            if stands and generation == assigned.generation and number < len(ready):
                ready[number].add(node_id)
        return Whereabouts(assigned, tuple(map(frozenset, ready)), tuple(map(float, durations)))

    def report(self, node_id: str, epoch: str, generation: int, shards: Iterable[Shard]) -> bool:
        """Tell that a node has shards, of one collection, in its memory; False if that epoch does not stand."""
        listed = list(shards)
        fields = [_ready_field(generation, shard.number, node_id) for shard in listed]
        names = [self._keys.epochs, self._keys.shards_ready(listed[0].collection)]
        with foreign_errors(BrokerUnavailable, f"reporting shards of {node_id}"):
            return bool(self._report(names, [self._keys.node_queue(node_id), epoch, *fields]))

    def let_go(self, node_id: str, epoch: str, generation: int, shard: Shard) -> None:
        """Tell that a node needs to be asked for a shard no more."""
        name, fields = self._keys.shards_ready(shard.collection), _ready_field(generation, shard.number, node_id)
        with foreign_errors(BrokerUnavailable, f"letting go of {shard}"):
            self._let_go([name], [fields, epoch])

    def sweep(self, collection: str, assigned: Assigned | None) -> int:
        """Forget what was reported by nodes that are no more, and of generations before; return how many that were."""
        name, keys = self._keys.shards_ready(collection), self._keys
        with foreign_errors(BrokerUnavailable, f"sweeping {collection!r}"), self._client.pipeline() as pipe:
            pipe.hgetall(name)
            pipe.hgetall(keys.epochs)
            reported, epochs = pipe.execute()
            void = [
                (_ready_field(generation, number, node_id), epoch)
                for generation, number, node_id, epoch in _read_ready(reported)
                if epochs.get(keys.node_queue(node_id).encode()) != epoch
                or assigned is None
                or generation < assigned.generation
            ]
            return int(self._let_go([name], list(chain(*void)))) if void else 0


def _ready_field(generation: int, number: int, node_id: str) -> str:
    return f"{generation}/{number}/{node_id}"


def _read_ready(reported: Mapping[bytes, bytes]) -> Iterable[tuple[int, int, str, bytes]]:
    for name, epoch in reported.items():
        generation, number, node_id = text(name).split("/", 2)
        yield int(generation), int(number), node_id, epoch
