"""Which node to ask for which shards of a collection, as a process that sends searches sees it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.model import Node
from cluster_tasks.shards.assignments import AssignmentTable, Whereabouts
from cluster_tasks.shards.manager import SERVED
from cluster_tasks.shards.placement import Shard, cover

logger = logging.getLogger(__name__)

REMEMBERED = 1_000
"""Collections."""
ANY_NODE = ""
"""In the place of a node: whichever takes the job."""
LATE = 0.95
"""A search is late on a node when so many of the last ones took less."""
LATE_AT_LEAST_S, LATE_AT_MOST_S, LATE_AT_FIRST_S = 0.05, 2.0, 1.0
"""Sooner, a second node would search for what a pause of the first explains; later, its loss is about to be noticed."""
ENOUGH_DURATIONS = 20


@dataclass(frozen=True, slots=True)
class Shares:
    """Whom to ask for which shards of one generation of a collection."""

    generation: int
    of_nodes: Mapping[str, Sequence[int]]
    """The numbers of the shards by node, or by ANY_NODE."""
    seconds: Mapping[str, str] = field(default_factory=dict)
    """By node another one that is to search its shards if it is late; only where one has some of them in memory."""
    late_after_s: float = LATE_AT_FIRST_S


class ShardMap:
    """What this process knows of the shards, not older than ``fresh_s``. Threads may share one, and it survives a fork.

    ``nodes`` returns the nodes as last seen, the same object until they are seen anew.
    """

    def __init__(
        self, table: AssignmentTable, nodes: Callable[[], Sequence[Node]], clock: Clock, fresh_s: float
    ) -> None:
        self._table, self._nodes, self._clock, self._fresh_s = table, nodes, clock, fresh_s
        self._known: dict[str, tuple[float, Whereabouts | None]] = {}
        self._seen: Sequence[Node] = ()
        self._sent: Counter[str] = Counter()

    def shares(self, collection: str) -> Shares | None:
        """Say whom to ask for the shards of a collection; None: they are assigned to nobody.

        While Redis does not answer, by what was known last.
        """
        found = self._whereabouts(collection)
        if found is None:
            return None
        loads = self._loads()
        jobs = divide(collection, found, loads)
        self._sent.update(jobs.keys())
        return Shares(found.assigned.generation, jobs, seconds(found, jobs, loads), late_after_s(found.durations_s))

    def _whereabouts(self, collection: str) -> Whereabouts | None:
        read_at_s, known = self._known.get(collection, (float("-inf"), None))
        now_s = self._clock.monotonic()
        if now_s - read_at_s < self._fresh_s:
            return known
        try:
            known = self._table.whereabouts(collection)
        except BrokerUnavailable as exc:
            logger.debug("shards are where they were: %s", exc)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[collection] = now_s, known
        return known

    def _loads(self) -> dict[str, float]:
        """How much the nodes that may be asked have to do, with what this process has sent since it saw them."""
        nodes = self._nodes()
        if nodes is not self._seen:
            self._seen = nodes
            self._sent.clear()
        return {
            node.id: (node.in_flight + self._sent[node.id]) / max(1, node.capacity.max_connections)
            for node in nodes
            if node.accepts(SERVED)
        }


def divide(collection: str, found: Whereabouts, loads: Mapping[str, float]) -> dict[str, list[int]]:
    """Say whom of the nodes in ``loads`` to ask for which shards: those that are ready, of equals the least loaded.

    For a shard that nobody has ready those that are to hold it, and if none of them can be asked ANY_NODE.
    """
    shards = [Shard(collection, number) for number in range(len(found.assigned.nodes))]
    jobs: dict[str, list[int]] = {}
    left = shards
    for able in found.ready, found.assigned.nodes:
        askable = {
            shard: tuple(sorted(node_id for node_id in able[shard.number] if node_id in loads)) for shard in left
        }
        asked, left = cover(askable, left, loads)
        for node_id, its in asked.items():
            jobs[node_id] = sorted([*jobs.get(node_id, []), *(shard.number for shard in its)])
    if left:
        jobs[ANY_NODE] = [shard.number for shard in left]
    return jobs


def seconds(found: Whereabouts, jobs: Mapping[str, Sequence[int]], loads: Mapping[str, float]) -> dict[str, str]:
    """Say for each node of ``jobs`` which other one has most of its shards in memory, of equals the least loaded."""
    others: dict[str, str] = {}
    for node_id, numbers in jobs.items():
        has = Counter(other for number in numbers for other in found.ready[number] if other in loads)
        del has[node_id]
        if has and node_id != ANY_NODE:
            others[node_id] = min(has, key=lambda other: (-has[other], loads[other], other))
    return others


def late_after_s(durations_s: Sequence[float]) -> float:
    """Say when a part of a search is late, by how long the last ones took."""
    if len(durations_s) < ENOUGH_DURATIONS:
        return LATE_AT_FIRST_S
    percentile = sorted(durations_s)[int(LATE * len(durations_s))]
    return min(max(percentile, LATE_AT_LEAST_S), LATE_AT_MOST_S)
