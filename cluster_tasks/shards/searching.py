"""How the tables of several shards are asked at once for what is searched for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cluster_tasks.shards import tables
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Candidates, Document, Passage
from cluster_tasks.shards.filters import to_sql
from cluster_tasks.shards.fusion import depth, merge, rank
from cluster_tasks.shards.query import Query

if TYPE_CHECKING:
    from lancedb.table import Table


def best(database: Database, shards: Sequence[Table], query: Query) -> list[Passage]:
    """Return the best ``query.k`` documents of the tables, best first."""
    nearest, matching = _rankings(database, shards, query)
    ranked = rank(query.mode, nearest, matching, query.k)
    documents = _read(database, [hit for _, hit in ranked])
    return [_passage(documents[hit.id], score) for score, hit in ranked]


def candidates(database: Database, shards: Sequence[Table], query: Query) -> Candidates:
    """Return what is needed of these tables to find the best ``query.k`` documents of them and others."""
    enough = depth(query.mode, query.k)
    nearest, matching = (merge(rankings, enough) for rankings in _rankings(database, shards, query))
    documents = _read(database, list({hit.id: hit for hit in [*nearest, *matching]}.values()))
    return Candidates(
        nearest=[_passage(documents[hit.id], hit.score) for hit in nearest],
        matching=[_passage(documents[hit.id], hit.score) for hit in matching],
    )


def _rankings(
    database: Database, shards: Sequence[Table], query: Query
) -> tuple[list[list[tables.Hit]], list[list[tables.Hit]]]:
    """Return what the vector finds in each table, and what the text does; nothing for what the mode leaves out."""
    enough, condition = depth(query.mode, query.k), to_sql(query.conditions)
    asked: list[Callable[[], list[tables.Hit]]] = []
    if query.mode != "text":
        asked += [partial(tables.nearest, table, query.vector, enough, condition) for table in shards]
    by_vector = len(asked)
    if query.mode != "vector":
        asked += [partial(tables.matching, table, query.text, enough, condition) for table in shards]
    found = database.map(lambda search: search(), asked)
    return found[:by_vector], found[by_vector:]


def _read(database: Database, hits: Sequence[tables.Hit]) -> dict[str, Document]:
    documents = {hit.id: hit.document for hit in hits if hit.document is not None}
    by_table: dict[int, list[tables.Hit]] = {}
    for hit in hits:
        if hit.document is None:
            by_table.setdefault(id(hit.table), []).append(hit)
    read = database.map(tables.read, by_table.values())
    return documents | {document.id: document for found in read for document in found}


def _passage(document: Document, score: float) -> Passage:
    return Passage(id=document.id, text=document.text, metadata=dict(document.metadata), score=score)
