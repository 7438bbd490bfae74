"""Which nodes hold which shards: a plan that every process makes alike, and that moves little when nodes change."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite, log
from types import MappingProxyType

from cluster_tasks.shards.levelling import Layout, fair_shares


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """A part of a collection; as text ``collection/number``."""

    collection: str
    number: int

    def __str__(self) -> str:
        return f"{self.collection}/{self.number}"


@dataclass(frozen=True, slots=True)
class Holder:
    """A node that can hold shards. Raises ValueError for a capacity that is not a finite number above 0."""

    node_id: str
    capacity: float
    """In any unit that all holders share."""
    zone: str = ""
    """What fails together; the nodes that name none are one zone."""

    def __post_init__(self) -> None:
        if not (isfinite(self.capacity) and self.capacity > 0):
            raise ValueError(f"capacity {self.capacity} of holder {self.node_id!r} is not a finite number above 0")


Assignment = Mapping[Shard, tuple[str, ...]]
"""The ids of the nodes that hold each shard, the primary first."""
NOTHING: Assignment = MappingProxyType({})


def place(
    shards: Iterable[Shard], holders: Iterable[Holder], replicas: int, current: Assignment = NOTHING
) -> dict[Shard, tuple[str, ...]]:
    """Say who holds each shard: ``replicas`` nodes, or all where there are fewer; the primary first.

    What comes first wins:

    - the copies of a shard lie in as many zones as they can;
    - no node has more than ``levelling.bound`` of its share: a quarter above, rounded up where shards are few. The
      share follows from capacity as far as zones leave a choice: with as many replicas as zones, a zone of one small
      node has every shard;
    - what ``current`` has stays, but a node far below its share, as one that joined, is given its share of it;
    - what is new goes to nodes below their share, each shard to those that score highest for it.

    So if a node is lost, what it had moves and the rest stays; where shards are few, a copy more may have to. Its
    primaries pass to replicas that are left. Primaries are balanced likewise, by the shards that a node holds. A plan
    that comes back as ``current`` keeps all copies.

    Raises ValueError for ``replicas`` below 1, and for two holders of one id.
    """
    given = list(holders)
    nodes = {holder.node_id: holder for holder in given}
    if replicas < 1 or len(nodes) < len(given):
        ids = sorted(holder.node_id for holder in given)
        raise ValueError(f"cannot place {replicas} replicas on {ids}: at least 1, and each id once")
    wanted, count = sorted(set(shards)), min(replicas, len(nodes))
    if not nodes:
        return dict.fromkeys(wanted, ())

    def score(shard: Shard, node_id: str) -> float:
        return _score(shard, nodes[node_id])

    zones = {node_id: holder.zone for node_id, holder in nodes.items()}
    capacities = {node_id: holder.capacity for node_id, holder in nodes.items()}
    copies = Layout(fair_shares(capacities, zones, len(wanted), count), score, lambda _, taken: _choices(zones, taken))
    for shard in wanted:
        copies.put(shard, _still_valid(current.get(shard, ()), zones, count))
    for shard in wanted:
        copies.fill(shard, count)
    copies.level()

    heirs = {shard: _heirs(current.get(shard, ()), copies.where[shard]) for shard in wanted}
    shares = {node_id: len(held) / count for node_id, held in copies.held.items()}
    primaries = Layout(shares, score, lambda shard, _: heirs[shard])
    for shard in wanted:
        primaries.put(shard, [node_id for node_id in current.get(shard, ())[:1] if node_id in heirs[shard]])
    for shard in wanted:
        primaries.fill(shard, 1)
    primaries.level()
    return {
        shard: (*primary, *copies.best_first(shard, copies.where[shard] - primary))
        for shard, primary in primaries.where.items()
    }


def _choices(zones: Mapping[str, str], taken: AbstractSet[str]) -> list[str]:
    """Who may hold a shard beside ``taken``: nodes of other zones, and of any only when every zone has it."""
    used = {zones[node_id] for node_id in taken}
    return [node_id for node_id in zones if zones[node_id] not in used] or [
        node_id for node_id in zones if node_id not in taken
    ]


def _still_valid(current: Sequence[str], zones: Mapping[str, str], count: int) -> list[str]:
    """Those of ``current`` that are there, without the ones that keep the shard from reaching more zones."""
    present = [node_id for node_id in dict.fromkeys(current) if node_id in zones]
    first = {zones[node_id]: node_id for node_id in reversed(present)}
    apart = [node_id for node_id in present if first[zones[node_id]] == node_id]
    together = [node_id for node_id in present if first[zones[node_id]] != node_id]
    return apart[:count] + together[: max(0, count - len(set(zones.values())))]


def _heirs(current: Sequence[str], chosen: AbstractSet[str]) -> list[str]:
    """Who may be primary: whoever holds the shard; after a loss those that had it before, for they have loaded it."""
    left = [node_id for node_id in current if node_id in chosen]
    return left if left and current[0] not in chosen else sorted(chosen)


def _score(shard: Shard, holder: Holder) -> float:
    """Weighted rendezvous hashing, ``-w / ln(h)`` with ``h`` uniform in (0, 1).

    The rule to ask the node that scores highest is Thaler and Ravishankar's (1998); the weight enters as in the
    logarithmic method of Schindelhauer and Schomaker (Weighted Distributed Hash Tables, 2005).
    """
    # BLAKE2b (RFC 7693): the same in every process and release, unlike ``hash``.
    digest = blake2b(f"{shard}\0{holder.node_id}".encode(), digest_size=8).digest()
    # 52 bits and a half of one: neither 0 nor 1, where the logarithm fails or is 0.
    return -holder.capacity / log(((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52)


@dataclass(frozen=True, slots=True)
class Move:
    """What changes for a shard. A change of the primary alone is no move: nothing is loaded."""

    shard: Shard
    loads: tuple[str, ...]
    """Nodes that are to load it."""
    drops: tuple[str, ...]
    """Nodes that may drop it."""


def moves(before: Assignment, after: Assignment) -> list[Move]:
    """The difference of two plans, by shard; a shard that is in one of them only is loaded or dropped by all."""
    found = []
    for shard in sorted(before.keys() | after.keys()):
        old, new = set(before.get(shard, ())), set(after.get(shard, ()))
        if old != new:
            found.append(Move(shard, tuple(sorted(new - old)), tuple(sorted(old - new))))
    return found


def cover(
    assignment: Assignment, shards: Iterable[Shard], load: Mapping[str, float]
) -> tuple[dict[str, list[Shard]], list[Shard]]:
    """Say which node to ask for which of ``shards``, each for all of its own at once; and which shards nobody holds.

    Nodes that hold most of what is left are asked first (the greedy set cover of Johnson, 1974), of those the least
    loaded; none is asked whom the others can spare. A shard goes to the least loaded of the asked nodes that hold it.
    ``load`` is in any unit, such as jobs in flight; a node that it does not name has none.
    """
    wanted = sorted(set(shards))
    held: dict[str, set[Shard]] = defaultdict(set)
    for shard in wanted:
        for node_id in assignment.get(shard, ()):
            held[node_id].add(shard)
    least_loaded = sorted(held, key=lambda node_id: (load.get(node_id, 0.0), node_id))
    asked, left = list[str](), set[Shard]().union(*held.values())
    while left:
        # The first of those that hold equally many.
        asked.append(max(least_loaded, key=lambda node_id: len(held[node_id] & left)))
        left -= held[asked[-1]]
    askable = Counter(shard for node_id in asked for shard in held[node_id])
    for node_id in reversed(least_loaded):
        if node_id in asked and all(askable[shard] > 1 for shard in held[node_id]):
            asked.remove(node_id)
            askable.subtract(held[node_id])
    jobs: dict[str, list[Shard]] = {node_id: [] for node_id in sorted(asked)}
    for shard in (shard for shard in wanted if shard in askable):
        able = [node_id for node_id in assignment[shard] if node_id in jobs]
        jobs[min(able, key=lambda each: (load.get(each, 0.0), len(jobs[each]), each))].append(shard)
    return jobs, [shard for shard in wanted if shard not in askable]
