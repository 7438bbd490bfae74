"""What a process that searches does so that it need not load anything when it is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import Event
from typing import Protocol

from cluster_tasks.clock import Clock
from cluster_tasks.errors import CollectionNotFound, LayoutChanged, StoreUnavailable
from cluster_tasks.shards.assignments import AssignmentTable, Division
from cluster_tasks.shards.layout import Layout
from cluster_tasks.shards.placement import Shard

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""So often one process of the cluster looks which collections there are."""
TELL_EVERY_S = 30.0
"""So often a process tells again what it has in memory."""
Held = Mapping[Shard, int]
"""Shards, each with its generation."""


class WarmStore(Protocol):
    """What a keeper needs of a store. Everything may raise StoreUnavailable."""

    def collections(self) -> list[str]:
        """The names of all collections."""

    def layout(self, collection: str) -> Layout:
        """How a collection is divided. Raises CollectionNotFound."""

    def warm(self, collection: str, shards: list[int] | None = None, generation: int | None = None) -> None:
        """Load shards, None: all, of a generation, None: the present one, into memory."""


class ShardKeeper:
    """Loads the shards that are assigned to its node into the memory of this process, and tells when they are there.

    A node of several processes has one in each. It is ready when the first of them is: that one has brought the files
    to this machine, and the others follow. ``store`` gives the store when it is first needed.
    """

    def __init__(self, node_id: str, table: AssignmentTable, store: Callable[[], WarmStore], clock: Clock) -> None:
        self._node_id, self._table, self._store, self._clock = node_id, table, store, clock
        self._stopping = Event()
        self._warm: dict[Shard, int] = {}
        self._done: tuple[str, str] | None = None
        """Version and epoch of which nothing is left to do."""
        self._told = "", 0.0
        """The epoch under which all that is warm was reported, and when."""

    def stop(self) -> None:
        """Load nothing more; a step under way ends with the shard that it is at."""
        self._stopping.set()

    def step(self) -> None:
        """Do what is to be done now. Raises BrokerUnavailable and StoreUnavailable; then it is to be called again."""
        if self._table.claim("look", LOOK_EVERY_S):
            tell_collections(self._table, self._store())
        version, epoch = self._table.glance(self._node_id)
        if not epoch:
            return
        self._tell_again(epoch)
        if (version, epoch) == self._done:
            return
        wanted = self._table.read().shards_of(self._node_id)
        failures = list(filter(None, [self._load(epoch, shard, wanted[shard]) for shard in sorted(wanted)]))
        all_gone = self._let_go(epoch, wanted)
        if failures:
            raise failures[0]
        if all_gone and not self._stopping.is_set():
            self._done = version, epoch

    def _tell_again(self, epoch: str) -> None:
        """After a fence, for what is in memory has stayed there; and now and then, for Redis may have lost it."""
        now_s = self._clock.monotonic()
        if epoch == self._told[0] and now_s - self._told[1] < TELL_EVERY_S:
            return
        for shard, generation in self._warm.items():
            self._table.report(self._node_id, epoch, generation, [shard])
        self._told = epoch, now_s

    def _load(self, epoch: str, shard: Shard, generation: int) -> StoreUnavailable | None:
        if self._warm.get(shard) == generation or self._stopping.is_set():
            return None
        try:
            self._store().warm(shard.collection, [shard.number], generation)
        except (CollectionNotFound, LayoutChanged) as exc:
            # The assignment follows.
            logger.info("shard %s is not loaded: %s", shard, exc)
            return None
        except StoreUnavailable as exc:
            return exc
        self._table.report(self._node_id, epoch, generation, [shard])
        self._warm[shard] = generation
        logger.info("shard %s is loaded", shard)
        return None

    def _let_go(self, epoch: str, wanted: Held) -> bool:
        """Let go of what others hold now, as soon as they have it in memory; False if that is still to come."""
        left = False
        for shard, generation in [item for item in self._warm.items() if item[0] not in wanted]:
            if not self._is_ready_elsewhere(shard, generation):
                left = True
                continue
            self._table.let_go(self._node_id, epoch, generation, shard)
            del self._warm[shard]
        return not left

    def _is_ready_elsewhere(self, shard: Shard, generation: int) -> bool:
        found = self._table.whereabouts(shard.collection)
        if found is None or found.assigned.generation != generation or shard.number >= len(found.ready):
            return True
        return set(found.assigned.nodes[shard.number]) <= found.ready[shard.number]


def tell_collections(table: AssignmentTable, store: WarmStore) -> None:
    """Tell how the collections of a store are divided. Raises BrokerUnavailable and StoreUnavailable."""
    # In this order: what is known and is not there was there before.
    known = table.divisions()
    found: dict[str, Division] = {}
    for name in store.collections():
        try:
            layout = store.layout(name)
        except CollectionNotFound:
            continue
        found[name] = Division(layout.generation, layout.shards)
    for name, division in found.items():
        held = known.get(name)
        if held and held.generation > division.generation:
            # The store was restored from a backup or made anew: those who hold shards could not load what is known.
            table.withdraw(name, held.generation)
        if held != division:
            table.announce(name, division)
    # An empty store may be a folder that this node alone sees.
    for name in known.keys() - found.keys() if found else ():
        table.withdraw(name, known[name].generation)
