"""One shard, a LanceDB table: the columns ``id``, ``text``, ``metadata``, ``vector`` and ``token``.

- ``metadata`` is binary JSON that LanceDB reads inside the query: a search ranks only documents that match its
  filter, and finds ``k`` of them if there are so many. The cost: a filter parses the metadata of every document,
  about 0.3 µs each.
- ``vector`` has length 1: cosine similarity is then a dot product, and a zero vector scores 0 with all others.
  A search reads every vector, about 60 ms for 100,000 of 384 dimensions on two cores, or an index (``indexes``).
- ``text`` has an index of its words (``indexes``).
- ``id`` is declared as the primary key, because LanceDB finds two writers that insert the same new id by that
  declaration alone. It has no index, so an upsert reads all ids: about 30 ms for 100,000.
- ``token`` is that of the lock under which the row was written (``writers``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import StaleWriter
from cluster_tasks.shards.documents import Document, decode_metadata, encode_metadata
from cluster_tasks.shards.fusion import in_order, is_settled
from cluster_tasks.shards.indexes import INDEX_FROM, vector_indexes
from cluster_tasks.shards.vectors import similarity

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.query import AsyncStandardQuery
    from lancedb.table import AsyncTable, Table

DOCUMENT = ["id", "text", "metadata"]
"""The columns of what was stored."""
UNLOCKED = 0
"""The token of rows that were written without a lock: whoever has one may replace them."""
PROBES = 40
"""Partitions of an index of vectors that a search reads."""
AT_ONCE = 256
"""So few hits are read whole by the search itself, in a tenth of the time that reading them afterwards takes."""
REFINED = 3
"""So many times as many rows as are wanted are ranked by their exact vectors."""


class Hit(NamedTuple):
    """A row that a search found."""

    score: float
    """Higher is better."""
    id: str
    row_id: int
    table: AsyncTable
    """In the very version that was searched: row ids mean nothing in another."""
    document: Document | None
    """None: ``read`` reads it."""


def schema(dimensions: int, embedding_model: str) -> pa.Schema:
    """Return the columns of a table."""
    import pyarrow as pa

    key = {"lance-schema:unenforced-primary-key": "true"}
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=key),
            pa.field("text", pa.string(), nullable=False),
            pa.field("metadata", pa.json_(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dimensions), nullable=False),
            pa.field("token", pa.int64(), nullable=False),
        ],
        metadata={"embedding_model": embedding_model},
    )


def rows(
    documents: Sequence[Document], units: NDArray[np.float32], embedding_model: str, token: int = UNLOCKED
) -> pa.Table:
    """Return ``documents`` and their vectors as rows of a table, written by the holder of ``token``."""
    import pyarrow as pa

    columns = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "metadata": [encode_metadata(document.metadata) for document in documents],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(units.ravel()), units.shape[1]),
        "token": np.full(len(documents), token, dtype=np.int64),
    }
    return pa.table(columns, schema=schema(units.shape[1], embedding_model))


def merge(table: Table, rows: pa.Table, token: int | None = None) -> int:
    """Insert ``rows``, or replace those of the same id; return the version made.

    With the ``token`` that they carry none is replaced that has a greater one. Raises StaleWriter if there were such.
    """
    condition = None if token is None else "target.token <= source.token"
    upsert = table.merge_insert("id").when_matched_update_all(where=condition).when_not_matched_insert_all()
    merged = upsert.execute(rows)
    if refused := len(rows) - merged.num_inserted_rows - merged.num_updated_rows:
        assert token is not None
        raise StaleWriter(table.name, token, refused)
    version: int = merged.version
    return version


def delete(table: Table, condition: str, token: int | None = None) -> tuple[int, int]:
    """Delete the rows that meet ``condition`` and have no greater ``token``; return how many, and the version."""
    ours = "" if token is None else f" AND token <= {token}"
    result = table.delete(f"({condition}){ours}")
    return result.num_deleted_rows, result.version  # type: ignore[attr-defined]  # LanceDB's stub lacks it.


async def nearest(table: AsyncTable, query: NDArray[np.float32], k: int, condition: str) -> list[Hit]:
    """Return the ``k`` rows nearest to a unit vector that meet the SQL ``condition``, by cosine similarity.

    All of them, exactly, in a table without an index of vectors; with one, nearly always.
    """

    # Few rows that match may lie in other partitions than those near the query, and are soon read.
    is_exact = bool(condition) and await _has_index(table) and await table.count_rows(condition) < INDEX_FROM
    hits = await _best(partial(_nearest, table, query, condition, is_exact), k)
    if len(hits) < k and not is_exact and await _has_index(table):
        # The partitions that were read have no more.
        hits = await _best(partial(_nearest, table, query, condition, True), k)
    return hits


async def scan(table: AsyncTable, condition: str) -> AsyncIterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the ids and metadata of the rows that meet the SQL ``condition``, some of them at a time."""
    search = table.query().select(["id", "metadata"])
    if condition:
        search.where(condition)
    async for batch in await search.to_batches():
        if rows := batch.to_pylist():
            yield [(row["id"], decode_metadata(row["metadata"])) for row in rows]


async def documents(table: AsyncTable, condition: str) -> list[Document]:
    """Return the documents that meet the SQL ``condition``, in any order."""
    return list(map(_document, await table.query().where(condition).select(DOCUMENT).to_list()))


async def matching(table: AsyncTable, text: str, k: int, condition: str) -> list[Hit]:
    """Return the ``k`` rows that have words of ``text`` and meet the SQL ``condition``, by BM25.

    ``text`` is words and nothing else: LanceDB is handed a query and no language.
    """
    from lancedb.query import MatchQuery

    words = MatchQuery(text, "text")  # type: ignore[call-arg]  # mypy does not see the defaults of its dataclass.
    return await _best(lambda limit: _found(table, table.query().nearest_to_text(words), "_score", condition, limit), k)


async def _has_index(table: AsyncTable) -> bool:
    return bool(vector_indexes(await table.list_indices()))


async def _nearest(
    table: AsyncTable, query: NDArray[np.float32], condition: str, is_exact: bool, limit: int
) -> list[Hit]:
    search = table.query().nearest_to(query).column("vector").distance_type("dot")
    if is_exact:
        search.bypass_vector_index()
    else:
        search.nprobes(PROBES).refine_factor(REFINED)
    found = await _found(table, search, "_distance", condition, limit)
    return [hit._replace(score=similarity(1.0 - hit.score)) for hit in found]


async def _found(table: AsyncTable, search: AsyncStandardQuery, score: str, condition: str, limit: int) -> list[Hit]:
    if condition:
        search.where(condition)
    columns = DOCUMENT if limit <= AT_ONCE else ["id"]
    rows = (await search.select([*columns, score]).with_row_id().limit(limit).to_arrow()).to_pylist()
    return [
        Hit(row[score], row["id"], row["_rowid"], table, _document(row) if columns is DOCUMENT else None)
        for row in rows
    ]


async def _best(search: Callable[[int], Awaitable[list[Hit]]], k: int) -> list[Hit]:
    """Return the ``k`` best of a search that is told how many to find; of equals the least ids."""
    limit = k + 1
    while True:
        hits = in_order(await search(limit))
        if is_settled(hits, limit, k):
            return hits[:k]
        limit *= 8


async def read(hits: Sequence[Hit]) -> list[Document]:
    """Return the documents of ``hits`` of one table, in any order."""
    found = await hits[0].table.take_row_ids([hit.row_id for hit in hits]).select(DOCUMENT).to_list()
    return list(map(_document, found))


def _document(row: Mapping[str, Any]) -> Document:
    # It was checked when it was stored.
    return Document.model_construct(id=row["id"], text=row["text"], metadata=decode_metadata(row["metadata"]))
