"""Which node to ask for which shards of a collection, as a process that sends searches sees it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Shares:
    """Whom to ask for which shards of one generation of a collection."""

    generation: int
    of_nodes: Mapping[str, Sequence[int]]
    """The numbers of the shards by node, or by ANY_NODE."""


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
        jobs = divide(collection, found, self._loads())
        self._sent.update(jobs.keys())
        return Shares(found.assigned.generation, jobs)

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
