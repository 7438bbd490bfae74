"""How collections come and go, and their tables with them."""

from __future__ import annotations

import time
from datetime import timedelta

from cluster_tasks.shards import indexes, tables
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import KEPT_VERSIONS, Database
from cluster_tasks.shards.layout import Layout, check_collection, generations
from cluster_tasks.shards.layouts import not_found


def make(
    database: Database, catalogue: Catalogue, collection: str, shards: int, embedding_model: str, dimensions: int
) -> None:
    """Make a collection unless it exists. Of several makers at once one wins, and the others help it.

    A maker that dies leaves nothing that is seen, and the next finishes what it began.
    """
    check_collection(collection)
    while True:
        entry = catalogue.read(collection)
        if entry is not None and entry.state not in (State.MAKING, State.DROPPED):
            return
        if entry is None or entry.state is State.DROPPED:
            generation = 1 if entry is None else entry.newest + 1
            entry = _announce(catalogue, entry, Layout(collection, generation, shards, embedding_model, dimensions))
        if entry is not None:
            create_tables(database, entry.layout)
            if catalogue.change(entry, state=State.LIVE):
                return


def create_tables(database: Database, layout: Layout) -> None:
    """Make the tables of a layout, those that do not exist."""
    schema = tables.schema(layout.dimensions, layout.embedding_model)

    def create(name: str) -> None:
        database.create(name, schema)
        indexes.keep_words(database, name)

    database.map(create, map(layout.table, range(layout.shards)))


def drop(database: Database, catalogue: Catalogue, collection: str) -> None:
    """Remove a collection and its documents. Raises CollectionNotFound.

    It is gone at once. If this fails then, it is to be repeated: files are left.
    """
    check_collection(collection)
    while (entry := catalogue.read(collection)) is not None and entry.state is not State.DROPPED:
        catalogue.change(entry, state=State.DROPPED)
    # Not those of a collection of the same name that another makes already.
    newest = 0 if entry is None else entry.newest
    found = generations(database.names(), collection)
    left = [name for generation, names in found.items() if generation <= newest for name in names]
    if not left:
        raise not_found(catalogue, collection)
    database.map(database.drop, left)


def clean(database: Database, catalogue: Catalogue, collection: str, kept: timedelta = KEPT_VERSIONS) -> None:
    """Remove the tables of layouts that readers may not be in any more, and those that a split has left unfinished.

    A layout stays for as long as ``kept`` after it ceased to be live. A reader that is in it even then begins anew.
    """
    # Before the row is read: what is announced after that has a generation that is not among these.
    found = generations(database.names(), collection)
    entry = catalogue.read(collection)
    if entry is None or entry.state is not State.LIVE:
        return
    oldest_s = time.time() - kept.total_seconds()
    needed = {entry.layout.generation}
    needed |= {int(generation) for generation, retired_s in entry.retired.items() if retired_s > oldest_s}
    database.map(database.drop, [name for generation in found.keys() - needed for name in found[generation]])


def _announce(catalogue: Catalogue, dropped: Entry | None, layout: Layout) -> Entry | None:
    """Begin to make a collection; None: another was quicker."""
    if dropped is not None:
        return catalogue.change(dropped, layout=layout, state=State.MAKING, newest=layout.generation, retired={})
    entry = Entry(layout, State.MAKING, layout.generation)
    return entry if catalogue.add(entry) else None
