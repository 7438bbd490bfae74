"""The live layouts of collections, and work that is done in them while they may change.

A split (``resharding``) announces itself in the catalogue, copies, and puts its layout in the place of the old one.
Readers go on in the old one. A writer looks at the catalogue again after its commits: if it sees no split, they came
before one was announced, and so before it copied; otherwise it waits, and writes once more. So no write that has
returned is left behind, whatever locks do.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cluster_tasks.errors import BeingSplit, CollectionNotFound, LayoutChanged, StoreUnavailable, did_you_mean
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.layout import Layout, check_collection

if TYPE_CHECKING:
    from lancedb.table import AsyncTable, Table

SILENCE_S = 15.0
"""A split whose row of the catalogue stands still for so long, by its observer's clock, is broken off by a writer."""
WRITERS_WAIT_S = 600.0
POLL_S = (0.05, 0.25)
"""Who waits looks again after a time between these."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Layouts:
    """The layouts of all collections. Threads may share one. Everything may raise StoreUnavailable."""

    def __init__(
        self, database: Database, catalogue: Catalogue, silence_s: float = SILENCE_S,
        writers_wait_s: float = WRITERS_WAIT_S,
    ) -> None:  # fmt: skip
        self._database, self._catalogue, self._silence_s = database, catalogue, silence_s
        self._writers_wait_s = writers_wait_s
        self._standing: dict[str, tuple[int, float]] = {}
        """By collection the revision of a row that shows a split, and when it was first seen so."""

    def live(self, collection: str, generation: int | None = None) -> Layout:
        """Return the layout in which a collection is read.

        Raises CollectionNotFound, and LayoutChanged if it is not of the ``generation`` that is named.
        """
        layout = self._entry(collection).layout
        if generation not in (None, layout.generation):
            raise LayoutChanged(f"collection {collection!r} is in generation {layout.generation}, not {generation}")
        return layout

    def read(self, collection: str, generation: int | None, work: Callable[[Layout], T]) -> T:
        """Do ``work`` in the live layout; again, if it fails because another layout has come in its place meanwhile.

        Raises as ``live`` and ``work`` do.
        """
        while True:
            layout = self.live(collection, generation)
            try:
                return work(layout)
            except StoreUnavailable:
                # The tables of a layout go some time after it.
                if self.live(collection, generation) == layout:
                    raise

    def write(self, collection: str, generation: int | None, work: Callable[[Layout], T]) -> T:
        """Do ``work``, which commits, in the live layout while nobody splits the collection; return its first result.

        It is done again if a split was announced before it was over, and must be safe to repeat. Raises as ``read``
        does, and BeingSplit if a split takes longer than writers wait.
        """
        results: list[T] = []
        while True:
            self.settled(collection)
            layout = self.live(collection, generation)
            try:
                results.append(work(layout))
            except StoreUnavailable:
                if self.live(collection, generation) == layout:
                    raise
                continue
            after = self._catalogue.read(collection)
            if after is None or after.state is State.DROPPED or (after.state, after.layout) == (State.LIVE, layout):
                return results[0]

    def settled(self, collection: str, wait_s: float | None = None) -> Entry:
        """Wait until nobody splits a collection, and return its row. A split whose process has died is broken off.

        That needs no certainty: what is broken off cannot put its layout in place any more. Raises BeingSplit after
        ``wait_s``; None: as long as writers wait.
        """
        wait_s = self._writers_wait_s if wait_s is None else wait_s
        until_s = time.monotonic() + wait_s
        while (entry := self._entry(collection)).state is State.SPLITTING:
            now_s = time.monotonic()
            seen, since_s = self._standing.get(collection, (0, 0.0))
            if entry.revision != seen:
                self._standing[collection] = entry.revision, now_s
            elif now_s - since_s > self._silence_s and self._catalogue.change(entry, state=State.LIVE):
                logger.warning("split broken off", extra={"collection": collection, "silent_s": now_s - since_s})
                continue
            if now_s > until_s:
                raise BeingSplit(f"collection {collection!r} is still being split after {wait_s:g} s")
            time.sleep(random.uniform(*POLL_S))
        return entry

    def open(self, layout: Layout, shards: Sequence[int]) -> list[Table]:
        """Return the tables of shards as they are now."""
        names = [layout.table(shard) for shard in shards]
        return _all_of(names, self._database.map(self._database.open, names), layout)

    async def open_to_ask(self, layout: Layout, shards: Sequence[int]) -> list[AsyncTable]:
        """Return the tables of shards as they are now, for coroutines."""
        names = [layout.table(shard) for shard in shards]
        return _all_of(names, await asyncio.gather(*map(self._database.open_to_ask, names)), layout)

    def _entry(self, collection: str) -> Entry:
        check_collection(collection)
        entry = self._catalogue.read(collection)
        if entry is None or entry.state in (State.MAKING, State.DROPPED):
            raise not_found(self._catalogue, collection)
        return entry


def _all_of(names: Sequence[str], tables: Sequence[T | None], layout: Layout) -> list[T]:
    found = [table for table in tables if table is not None]
    if len(found) < len(names):
        missing = sorted(name for name, table in zip(names, tables, strict=True) if table is None)
        raise StoreUnavailable(f"collection {layout.collection!r}: no tables {missing}")
    return found


def not_found(catalogue: Catalogue, collection: str) -> CollectionNotFound:
    """Return the error that names the nearest collection that there is."""
    others = (name for name in catalogue.live() if name != collection)
    return CollectionNotFound(f"no collection {collection!r}{did_you_mean(collection, others)}")
