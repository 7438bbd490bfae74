"""The indexes of a shard's table, and its upkeep.

``words`` is for full-text search. It splits texts at whatever is no letter or digit, ignores case and accents, reduces
English words to their stems and leaves out the commonest. Words of 41 characters and more, and writing without blanks
between words such as Chinese, are found as a whole only.

``vectors-N`` is for vectors, of tables that have INDEX_FROM rows or more and a dimension that 8 divides; N is the
number of rows that it was trained with. It keeps BITS for each number of a vector (RaBitQ), in partitions of some 4,000
rows of which a search reads ``tables.PROBES``: all of them, up to 160,000 rows, so that its recall depends on no
clusters in the data; and a share beyond. The nearest are then ranked by the vectors themselves, so a score is exact.
With fewer bits it missed most of the ten nearest among vectors without any structure; with 8 it takes four times as
long to build.

Rows that were written since an index was last brought up to date are found all the same: each search reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cluster_tasks.shards.database import Database, is_conflict, unavailable

if TYPE_CHECKING:
    from lancedb.index import IndexConfig
    from lancedb.table import AsyncTable, Table

WORDS = "words"
VECTORS = "vectors-"
INDEX_FROM = 10_000
"""Rows of a shard. An exact search in fewer takes no longer than one with an index, at 384 dimensions."""
BITS = 4
GROWTH = 4
"""A table that has grown so many times gets a new index of vectors: the old partitions have become too large."""

logger = logging.getLogger(__name__)


def keep_words(database: Database, name: str) -> bool:
    """Give a table its index of words, if it has none. False: a writer came in between."""
    from lancedb.index import FTS

    def build(table: Table) -> None:
        if WORDS not in (index.name for index in table.list_indices()):
            table.create_index("text", config=FTS(), name=WORDS)

    return _unless_conflict(database, name, build)


def keep_vectors(database: Database, name: str) -> bool:
    """Give a table an index of vectors that fits its size, if it is large enough. False: a writer came in between."""
    from lancedb.index import IvfRq

    def build(table: Table) -> None:
        rows, held = table.count_rows(), vector_indexes(table.list_indices())
        can_have_one = rows >= INDEX_FROM and table.schema.field("vector").type.list_size % 8 == 0
        if can_have_one and rows >= GROWTH * max(held, default=0):
            config = IvfRq(distance_type="dot", num_bits=BITS)
            table.create_index("vector", config=config, name=f"{VECTORS}{rows}")
            held.append(rows)
        for old in sorted(held)[:-1]:
            table.drop_index(f"{VECTORS}{old}")

    return _unless_conflict(database, name, build)


def optimize(database: Database, name: str) -> bool:
    """Compact a table and bring its indexes up to date; see ``Database.optimize``. False: a writer came in between.

    The indexes first: what is added to them is read but once, and their remains go with the old versions.
    """
    done = [keep_words(database, name), keep_vectors(database, name), database.optimize(name)]
    return all(done)


def vector_indexes(indexes: Iterable[IndexConfig]) -> list[int]:
    """Return with how many rows each index of vectors among those of a table was trained; one, but for a moment."""
    return [int(index.name.removeprefix(VECTORS)) for index in indexes if index.name.startswith(VECTORS)]


async def warm(table: AsyncTable) -> None:
    """Read the indexes of a table into memory."""
    for index in await table.list_indices():
        await table.prewarm_index(index.name)


def _unless_conflict(database: Database, name: str, build: Callable[[Table], None]) -> bool:
    table = database.open(name)
    if table is None:
        return False
    with unavailable(name):
        try:
            build(table)
        except RuntimeError as exc:
            if not is_conflict(exc):
                raise
            logger.info("index lost to a writer", extra={"table": name})
            return False
    return True
