"""One LanceDB table: the columns ``id``, ``text``, ``metadata`` and ``vector``, and the model that made the vectors.

- ``metadata`` is binary JSON that LanceDB reads inside the query: a search ranks only documents that match its
  filter, and finds ``k`` of them if there are so many. The cost: a filter parses the metadata of every document,
  about 0.3 µs each.
- ``vector`` has length 1: cosine similarity is then a dot product, and a zero vector scores 0 with all others.
  A search is exact and reads every vector: about 0.2 s for 100,000 of 384 dimensions on two cores.
- ``id`` is declared as the primary key, because LanceDB finds two writers that insert the same new id by that
  declaration alone. It has no index, so an upsert reads all ids: about 30 ms for 100,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import CollectionMismatch, InvalidArguments
from cluster_tasks.shards.documents import Document, Passage, decode_metadata, encode_metadata

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.query import LanceVectorQueryBuilder
    from lancedb.table import Table

Vectors = NDArray[np.floating[Any]]
Hit = tuple[float, str, int]
"""Distance, document id, row id."""


def unit_rows(vectors: Vectors, rows: int) -> NDArray[np.float32]:
    """Scale each row to length 1; a zero row stays zero. Raises InvalidArguments unless ``rows`` finite vectors."""
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2 or len(array) != rows or not array.size:
        raise InvalidArguments(f"vectors of shape {array.shape} do not give {rows} documents one vector each")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise InvalidArguments("vectors must be finite")
    units = np.zeros(array.shape, dtype=np.float32)
    np.divide(array, lengths, out=units, where=lengths > 0, casting="same_kind")
    return units


def rows(documents: Sequence[Document], units: NDArray[np.float32], embedding_model: str) -> pa.Table:
    """Return the rows of ``documents``, whose schema is the one to make the table with."""
    import pyarrow as pa

    key = {"lance-schema:unenforced-primary-key": "true"}
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=key),
            pa.field("text", pa.string(), nullable=False),
            pa.field("metadata", pa.json_(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), units.shape[1]), nullable=False),
        ],
        metadata={"embedding_model": embedding_model},
    )
    columns = {
        "id": [document.id for document in documents],
        "text": [document.text for document in documents],
        "metadata": [encode_metadata(document.metadata) for document in documents],
        "vector": list(units),
    }
    return pa.table(columns, schema=schema)


def check_fit(table: Table, dimensions: int, embedding_model: str | None = None) -> None:
    """Raise CollectionMismatch if the table holds vectors of another dimension or, if named, another model."""
    held_model, held_dimensions = _kind(table.schema)
    if dimensions != held_dimensions or embedding_model not in (None, held_model):
        asked = f"{dimensions} dimensions" + (f" by {embedding_model!r}" if embedding_model else "")
        raise CollectionMismatch(
            f"collection {table.name!r} holds vectors of {held_dimensions} dimensions by {held_model!r}; got {asked}"
        )


def merge(table: Table, rows: pa.Table) -> int:
    """Insert ``rows``, or replace those of the same id; return the version made. Raises CollectionMismatch."""
    model, dimensions = _kind(rows.schema)
    check_fit(table, dimensions, model)
    upsert = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    version: int = upsert.execute(rows).version
    return version


def nearest(table: Table, query: NDArray[np.float32], k: int, condition: str) -> list[Hit]:
    """Return the ``k`` nearest rows that meet the SQL ``condition``; of equally near ones the least ids."""
    limit = k + 1
    while True:
        search = cast("LanceVectorQueryBuilder", table.search(query, vector_column_name="vector")).distance_type("dot")
        if condition:
            search.where(condition, prefilter=True)
        found = search.select(["id", "_distance"]).with_row_id(True).limit(limit).to_arrow()
        hits = sorted(zip(*(found[name].to_pylist() for name in ("_distance", "id", "_rowid")), strict=True))
        # Rows as near as the k-th may lie beyond the limit, in the order of their insertion: widen it past them.
        if len(hits) < limit or hits[-1][0] > hits[k - 1][0]:
            return hits[:k]
        limit *= 8


def passages(table: Table, hits: Sequence[Hit]) -> list[Passage]:
    """Read the documents of ``hits``, in their order."""
    found = table.take_row_ids([row_id for _, _, row_id in hits]).select(["id", "text", "metadata"]).to_list()
    documents = {document["id"]: document for document in found}
    return [
        Passage(
            id=document_id,
            text=documents[document_id]["text"],
            metadata=decode_metadata(documents[document_id]["metadata"]),
            score=min(1.0, max(-1.0, 1.0 - distance)),
        )
        for distance, document_id, _ in hits
    ]


def _kind(schema: pa.Schema) -> tuple[str, int]:
    return schema.metadata[b"embedding_model"].decode(), schema.field("vector").type.list_size
