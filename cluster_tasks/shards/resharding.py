"""The change of a collection's number of shards while it is searched.

The documents are copied into the tables of a new layout, which are indexed, and one change of the catalogue puts it in
the place of the old one. Writers wait meanwhile; see ``layouts`` for why no write is lost. Whatever stops a split
before that change, a ``kill -9`` too, leaves the old layout whole, and tables that ``making.clean`` removes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from threading import Event, Thread
from typing import TYPE_CHECKING, Self

import numpy as np

from cluster_tasks.errors import StoreUnavailable
from cluster_tasks.shards import indexes, tables
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import Database, unavailable
from cluster_tasks.shards.layout import Layout, check_shards, shard_of
from cluster_tasks.shards.layouts import SILENCE_S, WRITERS_WAIT_S, Layouts
from cluster_tasks.shards.making import create_tables

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 20_000
"""Of one table, held in memory: 30 MB of vectors at 384 dimensions, and the texts."""

RETIRED_FOR_S = 86_400.0
"""So long the catalogue says when a layout ceased to be live."""
BEATS = 5
"""In the time after which a silent split is broken off."""

logger = logging.getLogger(__name__)


class Resharding:
    """Splits collections. Threads may share one."""

    def __init__(
        self, database: Database, catalogue: Catalogue, layouts: Layouts, silence_s: float = SILENCE_S
    ) -> None:
        self._database, self._catalogue, self._layouts = database, catalogue, layouts
        self._silence_s = silence_s

    def split(self, collection: str, shards: int) -> Layout:
        """Divide a collection into so many ``shards``, also as many as it has, and return the new layout.

        Waits for another split to end. Raises CollectionNotFound, and StoreUnavailable if it cannot, or if the
        collection was dropped meanwhile, or a writer has broken the split off because it was silent for too long: then
        the old layout goes on.
        """
        entry = self._announce(collection, check_shards(shards))
        old, new = entry.layout, replace(entry.layout, generation=entry.newest, shards=shards)
        beat = _Beat(self._catalogue, entry, self._silence_s / BEATS)
        try:
            with beat:
                create_tables(self._database, new)
                for shard in range(old.shards):
                    self._copy(old, shard, new, beat)
                for shard in range(shards):
                    beat.check()
                    indexes.optimize(self._database, new.table(shard))
            self._switch(beat, new)
        except BaseException:
            self._give_up(beat.entry, new)
            raise
        logger.info("collection split", extra={"collection": collection, "shards": shards, "before": old.shards})
        return new

    def _announce(self, collection: str, shards: int) -> Entry:
        while True:
            entry = self._layouts.settled(collection, WRITERS_WAIT_S)
            if announced := self._catalogue.change(entry, state=State.SPLITTING, newest=entry.newest + 1):
                logger.info("split begins", extra={"collection": collection, "shards": shards})
                return announced

    def _copy(self, old: Layout, shard: int, new: Layout, beat: _Beat) -> None:
        (source,) = self._layouts.open(old, [shard])
        with unavailable(source.name):
            read: list[pa.RecordBatch] = []
            # Each of its many small files may give a batch of its own.
            for batch in source.search().limit(None).to_batches(ROWS_AT_ONCE):
                read.append(batch)
                if sum(map(len, read)) >= ROWS_AT_ONCE:
                    beat.check()
                    self._append(read, new)
                    read = []
            if read:
                self._append(read, new)

    def _append(self, read: list[pa.RecordBatch], new: Layout) -> None:
        import pyarrow as pa

        rows = pa.Table.from_batches(read)
        # Whoever has a lock may replace what a split has written.
        unlocked = pa.array(np.full(len(rows), tables.UNLOCKED, dtype=np.int64))
        rows = rows.set_column(rows.schema.get_field_index("token"), rows.schema.field("token"), unlocked)
        shards = np.array([shard_of(name, new.shards) for name in rows["id"].to_pylist()])

        def append(shard: int) -> None:
            # Nobody else writes to these tables: a failure ends the split, and nothing is added twice.
            (table,) = self._layouts.open(new, [shard])
            with unavailable(table.name):
                table.add(rows.take(np.flatnonzero(shards == shard)))

        self._database.map(append, np.unique(shards).tolist())

    def _switch(self, beat: _Beat, new: Layout) -> None:
        entry, now_s = beat.entry, time.time()
        retired = {number: at_s for number, at_s in entry.retired.items() if at_s > now_s - RETIRED_FOR_S}
        retired[str(entry.layout.generation)] = now_s
        if self._catalogue.change(entry, state=State.LIVE, layout=new, retired=retired):
            return
        # It may have been done all the same, and its answer lost, and been tried again.
        if not self._is_live(new):
            raise beat.broken_off()

    def _is_live(self, new: Layout) -> bool:
        entry = self._catalogue.read(new.collection)
        return entry is not None and entry.layout == new

    def _give_up(self, entry: Entry, new: Layout) -> None:
        # As far as it can: what is left, writers and making.clean come upon.
        try:
            if self._catalogue.change(entry, state=State.LIVE) or not self._is_live(new):
                self._database.map(self._database.drop, map(new.table, range(new.shards)))
        except StoreUnavailable as exc:
            logger.warning("split not cleaned up", extra={"collection": new.collection}, exc_info=exc)


class _Beat:
    """Shows in the catalogue that a split is going on, in a thread of its own."""

    def __init__(self, catalogue: Catalogue, entry: Entry, every_s: float) -> None:
        self.entry = entry
        """The row as it was last changed by this."""
        self._catalogue, self._every_s = catalogue, every_s
        self._stop, self._is_lost = Event(), False
        self._thread = Thread(target=self._run, name="split", daemon=True)

    def check(self) -> None:
        """Raise StoreUnavailable if the split was broken off."""
        if self._is_lost:
            raise self.broken_off()

    def broken_off(self) -> StoreUnavailable:
        """Return the error of a split whose row another has changed."""
        return StoreUnavailable(f"the split of {self.entry.layout.collection!r} was broken off by another process")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                changed = self._catalogue.change(self.entry)
            except StoreUnavailable as exc:
                logger.warning("beat of a split failed", extra={"reason": str(exc)})
                continue
            if changed is None:
                self._is_lost = True
                return
            self.entry = changed
