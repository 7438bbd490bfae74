"""What clusters that do not fit on one machine would ask of Redis, found from what real ones ask.

Recorded is what real nodes and a coordinator say to Redis while they have nothing to do, at several sizes. A straight
line through how often each kind comes says how often it would at any size. For a size that is not there, as many
nodes are registered as a node registers itself, each says each of these commands once, in its own name, and then it is
measured what one of each kind costs Redis among so many. The sum over all kinds is the cost of the cluster.

Left out are the connections, of which the simulation has few, nodes that join or leave, and what was recorded a few
times only. Taken for granted is that a kind comes as often as the line says; whether it comes more and more often, the
exponents of the recorded rates say. All is checked at the size that was recorded last: simulated, it must cost what was
measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, cycle, islice
from typing import Any

import redis

from benchmarks.commands import Identity, Kinds, rates, said_by
from benchmarks.figures import exponent, line
from cluster_tasks import Cluster
from cluster_tasks.broker.placement import fetching_script, placing_script
from cluster_tasks.model import Node
from cluster_tasks.redis_store import script_source

Command = Sequence[bytes]
PACKAGES = ("cluster_tasks.broker", "cluster_tasks.registry", "cluster_tasks.metrics", "cluster_tasks.shards")
UNSAID = frozenset(
    {b"MULTI", b"EXEC", b"SUBSCRIBE", b"UNSUBSCRIBE", b"PSUBSCRIBE", b"CLIENT", b"HELLO", b"SELECT", b"INFO", b"SCRIPT"}
)
"""What opens, ends or brackets, and costs next to nothing."""
BLOCKING = frozenset({b"BRPOP", b"BLPOP"})
AT_ONCE = 500
LEAST_CALLS, MOST_CALLS = 20, 400
ENOUGH_CPU_S = 0.1
SELDOM = 10
"""What was recorded less often at the largest size is left out: a line through it says nothing."""
OFTEN = 0.05
"""Of all calls: of what comes less often, the growth of the rate is noise."""


def script_names() -> dict[str, str]:
    """The names of the scripts that nodes use, by SHA1."""
    named = {}
    for package in PACKAGES:
        for file in (files(package) / "scripts").iterdir():
            name, source = file.name.removesuffix(".lua"), file.read_text(encoding="utf-8")
            named[_sha1(source)] = name
            if package == PACKAGES[0]:
                # Of these many are whole only with what they share.
                named[_sha1(placing_script(name))] = name
                named[_sha1("\n".join((script_source(package, "letting_go"), source)))] = name
    return {**named, _sha1(fetching_script()): "fetch"}


def _sha1(source: str) -> str:
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Recording:
    """What a cluster of some size said to Redis when it had nothing to do."""

    nodes: Sequence[Identity]
    commands: Sequence[Command]
    lasted_s: float

    @property
    def size(self) -> int:
        """How many nodes there were, coordinators not counted."""
        return len(self.nodes)


@dataclass(frozen=True, slots=True)
class Cost:
    """What commands of one kind ask of Redis."""

    per_s: float
    cpu_us: float
    """Microseconds of processor for one."""

    @property
    def share(self) -> float:
        """Of one processor."""
        return self.per_s * self.cpu_us / 1e6


class Growth:
    """How often each kind comes at any size, and examples of it."""

    def __init__(self, recordings: Sequence[Recording], others: Iterable[Identity] = ()) -> None:
        """``others`` are those beside the nodes that speak, coordinators. Raises ValueError for less than two sizes."""
        # A name that came again has another epoch. The examples are those of the last recording.
        everybody = chain(*(recording.nodes for recording in recordings), others)
        kinds = Kinds(everybody, script_names())
        told = [
            rates((words for words in each.commands if words[0].upper() not in UNSAID), kinds.kind, each.lasted_s)
            for each in recordings
        ]
        self._recordings = recordings
        names = sorted(name for name, per_s in told[-1].items() if per_s * recordings[-1].lasted_s >= SELDOM)
        self._rates = {name: [each.get(name, 0.0) for each in told] for name in names}
        sizes = [recording.size for recording in recordings]
        self._lines = {name: line(sizes, per_s) for name, per_s in self._rates.items()}
        self.examples: dict[str, list[tuple[Command, Identity | None]]] = {name: [] for name in names}
        for words in recordings[-1].commands:
            name = kinds.kind(words)
            if name in self.examples:
                self.examples[name].append((words, kinds.giver(words)))

    def per_s(self, name: str, size: int) -> float:
        """How often a kind comes in a cluster of this size."""
        base, slope = self._lines[name]
        return base + slope * size

    def rate_exponents(self) -> dict[str, float]:
        """How the rate of each kind that comes often grows with the nodes that were recorded."""
        sizes = [recording.size for recording in self._recordings]
        # Of what did not come at all, once is the most that can have been missed.
        least = [1 / recording.lasted_s for recording in self._recordings]
        often = OFTEN * sum(per_s[-1] for per_s in self._rates.values())
        return {
            name: exponent(sizes, list(map(max, per_s, least)))
            for name, per_s in self._rates.items()
            if per_s[-1] >= often
        }


class Simulation:
    """A Redis with as many nodes as one likes, none of which runs.

    It is the one that was recorded, for it knows the scripts.
    """

    def __init__(self, client: redis.Redis, cluster: Cluster, sample: Node) -> None:
        """``sample`` is a node as one registers itself, ``cluster`` one on the Redis of ``client``."""
        self._client, self._cluster, self._sample = client, cluster, sample

    def costs(self, growth: Growth, size: int) -> Mapping[str, Cost]:
        """Return what each kind costs among so many nodes. Empties the Redis."""
        self._client.flushall()
        nodes = [self._join(f"sim{number}@host{number % 100}") for number in range(size)]
        self._say_once(growth, nodes)
        return {
            name: Cost(growth.per_s(name, size), self._cpu_us(growth.examples[name], nodes)) for name in growth.examples
        }

    def _join(self, name: str) -> Identity:
        epoch = self._cluster.epochs.open(name, self._sample.serves, self._cluster.app.tasks)
        assert isinstance(epoch, str)
        self._cluster.registry.register(self._sample.model_copy(update={"id": name, "epoch": epoch}))
        return Identity(name, epoch)

    def _say_once(self, growth: Growth, nodes: Sequence[Identity]) -> None:
        """Bring Redis into the state in which all have said everything."""
        for (words, giver), *_ in growth.examples.values():
            if giver is None or words[0].upper() in BLOCKING:
                continue
            for begin in range(0, len(nodes), AT_ONCE):
                self._say([said_by(words, giver, node) for node in nodes[begin : begin + AT_ONCE]])

    def _cpu_us(self, examples: Sequence[tuple[Command, Identity | None]], nodes: Sequence[Identity]) -> float:
        # Spread over all nodes, for who came first may be found first.
        chosen = cycle(nodes[:: max(1, len(nodes) // MOST_CALLS)])
        begun_s, calls = self._cpu_s(), 0
        for (words, giver), node in islice(zip(cycle(examples), chosen, strict=False), MOST_CALLS):
            said = list(words) if giver is None else said_by(words, giver, node)
            if said[0].upper() in BLOCKING:
                self._wait(said)
            else:
                self._say([said])
            calls += 1
            if calls % LEAST_CALLS == 0 and self._cpu_s() - begun_s > ENOUGH_CPU_S:
                break
        return (self._cpu_s() - begun_s) / calls * 1e6

    def _cpu_s(self) -> float:
        used: Any = self._client.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def _wait(self, words: Command) -> None:
        """Give a command that waits, and what it waits for: while nothing comes, Redis is busy with itself."""
        connection = self._client.connection_pool.get_connection()
        try:
            connection.send_packed_command(connection.pack_command(*words))
            self._client.lpush(words[1], b"")
            connection.read_response(disable_decoding=True)
        finally:
            self._client.connection_pool.release(connection)

    def _say(self, commands: Sequence[Command]) -> None:
        # Unparsed: a callback that makes sense of an answer is no cost of Redis.
        connection = self._client.connection_pool.get_connection()
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            for _ in commands:
                connection.read_response(disable_decoding=True)
        finally:
            self._client.connection_pool.release(connection)


def total(costs: Mapping[str, Cost]) -> Cost:
    """What all kinds cost together."""
    per_s = sum(cost.per_s for cost in costs.values())
    share = sum(cost.share for cost in costs.values())
    return Cost(per_s, share / per_s * 1e6 if per_s else 0.0)
