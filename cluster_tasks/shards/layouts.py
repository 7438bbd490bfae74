"""The live layouts of collections, and work that is done in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cluster_tasks.errors import CollectionNotFound, LayoutChanged, StoreUnavailable, did_you_mean
from cluster_tasks.shards import indexes, tables
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.layout import Layout, check_collection, generations

if TYPE_CHECKING:
    from lancedb.table import Table

T = TypeVar("T")


class Layouts:
    """The layouts of all collections. Threads may share one. Everything may raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._catalogue = Catalogue(database)

    def names(self) -> list[str]:
        """Return the names of all collections, sorted."""
        return self._catalogue.live()

    def live(self, collection: str, generation: int | None = None) -> Layout:
        """Return the layout in which a collection is read and written.

        Raises CollectionNotFound, and LayoutChanged if it is not of the ``generation`` that is named.
        """
        layout = self._entry(collection).layout
        if generation not in (None, layout.generation):
            raise LayoutChanged(f"collection {collection!r} is in generation {layout.generation}, not {generation}")
        return layout

    def work(self, collection: str, generation: int | None, work: Callable[[Layout], T]) -> T:
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

    def open(self, layout: Layout, shards: Sequence[int]) -> list[Table]:
        """Return the tables of shards as they are now."""
        names = [layout.table(shard) for shard in shards]
        found = [table for table in self._database.map(self._database.open, names) if table is not None]
        if len(found) < len(names):
            missing = set(names) - {table.name for table in found}
            raise StoreUnavailable(f"collection {layout.collection!r}: no tables {sorted(missing)}")
        return found

    def make(self, collection: str, shards: int, embedding_model: str, dimensions: int) -> None:
        """Make a collection unless it exists. Of several makers at once one wins, and the others help it.

        A maker that dies leaves nothing that is seen, and its name is made by the next.
        """
        check_collection(collection)
        while True:
            entry = self._catalogue.read(collection)
            if entry is not None and entry.state not in (State.MAKING, State.DROPPED):
                return
            if entry is None or entry.state is State.DROPPED:
                generation = 1 if entry is None else entry.layout.generation + 1
                layout = Layout(collection, generation, shards, embedding_model, dimensions)
                entry = self._announce(entry, layout)
            if entry is not None:
                self.create_tables(entry.layout)
                if self._catalogue.change(entry, state=State.LIVE):
                    return

    def create_tables(self, layout: Layout) -> None:
        """Make the tables of a layout, those that do not exist."""
        schema = tables.schema(layout.dimensions, layout.embedding_model)

        def create(name: str) -> None:
            self._database.create(name, schema)
            indexes.keep_words(self._database, name)

        self._database.map(create, map(layout.table, range(layout.shards)))

    def drop(self, collection: str) -> None:
        """Remove a collection and its documents. Raises CollectionNotFound.

        It is gone at once. If this fails then, it is to be repeated: files are left.
        """
        check_collection(collection)
        while (entry := self._catalogue.read(collection)) is not None and entry.state is not State.DROPPED:
            self._catalogue.change(entry, state=State.DROPPED)
        # Not those of a collection of the same name that another makes already.
        newest = 0 if entry is None else entry.layout.generation
        tables_of = generations(self._database.names(), collection)
        left = [name for generation, names in tables_of.items() if generation <= newest for name in names]
        if not left:
            raise self._not_found(collection)
        self._database.map(self._database.drop, left)

    def _announce(self, dropped: Entry | None, layout: Layout) -> Entry | None:
        """Begin to make a collection; None: another was quicker."""
        if dropped is not None:
            return self._catalogue.change(dropped, layout=layout, state=State.MAKING)
        entry = Entry(layout, State.MAKING)
        return entry if self._catalogue.add(entry) else None

    def _entry(self, collection: str) -> Entry:
        check_collection(collection)
        entry = self._catalogue.read(collection)
        if entry is None or entry.state in (State.MAKING, State.DROPPED):
            raise self._not_found(collection)
        return entry

    def _not_found(self, collection: str) -> CollectionNotFound:
        others = (name for name in self.names() if name != collection)
        return CollectionNotFound(f"no collection {collection!r}{did_you_mean(collection, others)}")
