"""Which collections there are, and which layout of each is the live one: one row each in a table beside theirs.

The layout is a fact of the stored data: it lies with them, and a change of it is one commit of that table, which
happens only if the row is as its changer has read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Any

from cluster_tasks.shards.database import Database, unavailable
from cluster_tasks.shards.filters import quote
from cluster_tasks.shards.layout import Layout

if TYPE_CHECKING:
    from lancedb.table import Table

NAME = "_catalogue"
"""No collection begins with ``_``."""


class State(StrEnum):
    """What may be done with a collection."""

    MAKING = "making"
    """Nothing: its tables may not all be there. Whoever meets it may finish that."""
    LIVE = "live"
    SPLITTING = "splitting"
    """Reading. Writers wait: what they wrote now might be left behind in the tables of before."""
    DROPPED = "dropped"
    """Nothing. Its row stays, so that no generation is ever given to two layouts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the catalogue."""

    layout: Layout
    state: State
    newest: int = 1
    """The highest generation that was ever given to a layout, whatever has become of it."""
    retired: Mapping[str, float] = field(default_factory=dict)
    """Generations that were live, and when each ceased to be, in seconds since 1970."""
    revision: int = 1
    """Raised with every change of the row."""

    def stored(self) -> str:
        """Return what the row holds besides the name and the revision."""
        kept = {"layout": asdict(self.layout), "state": self.state, "newest": self.newest, "retired": self.retired}
        return json.dumps(kept)


def _entry(revision: int, stored: str) -> Entry:
    kept = json.loads(stored)
    return Entry(Layout(**kept["layout"]), State(kept["state"]), kept["newest"], kept["retired"], revision)


class Catalogue:
    """The rows of all collections. Threads may share one. Everything may raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reading = Lock()
        self._table: Table | None = None
        self._version, self._entries = 0, dict[str, Entry]()

    def read(self, collection: str) -> Entry | None:
        """Return the row of a collection as it is now, in less than a millisecond if no row has changed."""
        return self._read().get(collection)

    def live(self) -> list[str]:
        """Return the names of the collections that can be used, sorted."""
        return sorted(name for name, entry in self._read().items() if entry.state not in (State.MAKING, State.DROPPED))

    def add(self, entry: Entry) -> bool:
        """Add the row of a collection; False: it has one, which was not touched."""
        import pyarrow as pa

        key = {"lance-schema:unenforced-primary-key": "true"}
        schema = pa.schema(
            [
                pa.field("collection", pa.string(), nullable=False, metadata=key),
                pa.field("revision", pa.int64(), nullable=False),
                pa.field("entry", pa.string(), nullable=False),
            ]
        )
        row = pa.table(
            {"collection": [entry.layout.collection], "revision": [entry.revision], "entry": [entry.stored()]},
            schema=schema,
        )
        if self._database.open(NAME) is None:
            self._database.create(NAME, schema)
        added = self._database.commit(
            NAME, lambda table: table.merge_insert("collection").when_not_matched_insert_all().execute(row)
        )
        self._database.compact_if_due(NAME, added.version)
        return bool(added.num_inserted_rows == 1)

    def change(self, entry: Entry, **changes: Any) -> Entry | None:
        """Change the row that was read as ``entry``, and return it; None: another has changed it before."""
        changed = replace(entry, revision=entry.revision + 1, **changes)
        where = f"collection = {quote(entry.layout.collection)} AND revision = {entry.revision}"
        values = {"revision": str(changed.revision), "entry": quote(changed.stored())}
        done = self._database.commit(NAME, lambda table: table.update(where=where, values_sql=values))
        self._database.compact_if_due(NAME, done.version)
        return changed if done.rows_updated == 1 else None

    def _read(self) -> Mapping[str, Entry]:
        with self._reading:
            if self._table is None:
                self._table = self._database.open(NAME)
            if self._table is None:
                return {}
            with unavailable(NAME):
                self._table.checkout_latest()  # type: ignore[no-untyped-call]  # LanceDB's own.
                version = self._table.version
                if version != self._version:
                    rows = self._table.to_arrow().to_pylist()
                    self._entries = {row["collection"]: _entry(row["revision"], row["entry"]) for row in rows}
                    self._version = version
            return self._entries
