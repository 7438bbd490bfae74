"""The epoch table: which incarnation of each node may work. It decides; a registry only tells who exists."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import redis

from cluster_tasks.errors import BrokerUnavailable, NodeNotFound
from cluster_tasks.keys import ANY_TYPE, Keys, priority_suffixes
from cluster_tasks.redis_store import foreign_errors, load_script, text

_PACKAGE = "cluster_tasks.broker"


class Standing(StrEnum):
    """How an epoch stands."""

    OK = "ok"
    DRAINING = "draining"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Beat:
    """What an observer sees of a node: which epoch, and how often it has beaten."""

    epoch: str
    counter: int


@dataclass(frozen=True, slots=True)
class Predecessor:
    """An epoch that stands under the name that a node wants to take."""

    beat: Beat


@dataclass(frozen=True, slots=True)
class Lists:
    """How the lists of the cluster stand, by list name."""

    lengths: Mapping[str, int]
    """Jobs that wait, those of nodes and the waiting lists. Empty lists are left out."""
    draining: Collection[str]
    """Lists of nodes on which nothing new is placed."""


class EpochTable:
    """Begins, beats, drains and ends epochs. Every method raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._open = load_script(client, _PACKAGE, "open_epoch")
        self._beat = load_script(client, _PACKAGE, "beat")
        self._fence = load_script(client, _PACKAGE, "fence")
        self._drain = load_script(client, _PACKAGE, "set_draining")

    def open(self, node_id: str, serves: Iterable[str]) -> str | Predecessor:
        """Begin an epoch and return it, or return the predecessor that stands under this name."""
        keys = self._keys
        types = "," + ",".join(sorted({*serves, ANY_TYPE})) + ","
        with foreign_errors(BrokerUnavailable, f"registering {node_id}"):
            status, epoch, *counter = self._open(
                [keys.epochs, keys.beats, keys.serves, keys.draining, keys.epoch_counter],
                [keys.node_queue(node_id), secrets.token_hex(6), types],
            )
        if text(status) == "opened":
            return text(epoch)
        return Predecessor(Beat(text(epoch), int(counter[0])))

    def beat(self, node_id: str, epoch: str) -> Standing:
        """Raise the beat counter; tells how the epoch stands."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"heartbeat of {node_id}"):
            reply = self._beat([keys.epochs, keys.beats, keys.draining], [keys.node_queue(node_id), epoch])
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

    def fence(self, node_id: str, seen: Beat, *, even_if_it_beats: bool = False) -> bool:
        """End an epoch, unless it has beaten since it was ``seen``; False if it has, or had ended. Safe to repeat."""
        keys, queue = self._keys, self._keys.node_queue(node_id)
        with foreign_errors(BrokerUnavailable, f"fencing {node_id}"):
            ended = self._fence(
                [keys.epochs, keys.beats, keys.serves, keys.draining, keys.backlog, keys.idle, keys.fenced]
                + [keys.unacked(node_id, seen.epoch), keys.remains_unacked(node_id, seen.epoch), keys.bell(node_id)],
                [queue, seen.epoch, "" if even_if_it_beats else seen.counter, f"{node_id}/{seen.epoch}"]
                + [keys.remains(node_id, seen.epoch), *priority_suffixes()],
            )
        return bool(ended)

    def fenced(self) -> list[tuple[str, str]]:
        """Return (node id, epoch) of the fenced epochs whose remains are not yet moved."""
        with foreign_errors(BrokerUnavailable, "reading fenced epochs"):
            members = [text(member) for member in self._client.smembers(self._keys.fenced)]
        return [(node_id, epoch) for node_id, _, epoch in (member.rpartition("/") for member in sorted(members))]

    def set_draining(self, node_id: str, draining: bool, epoch: str = "") -> None:
        """Stop or resume placing jobs on a node. Raises NodeNotFound if ``epoch`` ('': any) of it does not stand."""
        keys = self._keys
        with foreign_errors(BrokerUnavailable, f"draining {node_id}"):
            done = self._drain([keys.epochs, keys.draining], [keys.node_queue(node_id), epoch, int(draining)])
        if not done:
            raise NodeNotFound(node_id, self.beats())

    def lists(self) -> Lists:
        """Return how long the lists are and which take nothing new, in one round trip."""
        with foreign_errors(BrokerUnavailable, "reading queue lengths"), self._client.pipeline() as pipe:
            pipe.zrange(self._keys.backlog, 0, -1, withscores=True)
            pipe.smembers(self._keys.draining)
            listed, draining = pipe.execute()
        lengths = {text(queue): int(length) for queue, length in listed}
        return Lists(lengths, frozenset(map(text, draining)))

    def lengths(self) -> Mapping[str, int]:
        """Return how many jobs wait, by list name."""
        return self.lists().lengths
