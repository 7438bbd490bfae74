"""How the tables of several shards are asked at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from cluster_tasks.shards import indexes, tables
from cluster_tasks.shards.documents import Candidates, Document, Passage
from cluster_tasks.shards.filters import to_sql
from cluster_tasks.shards.fusion import depth, merge, rank
from cluster_tasks.shards.query import Query

if TYPE_CHECKING:
    from lancedb.table import AsyncTable

T = TypeVar("T")


async def best(shards: Sequence[AsyncTable], query: Query) -> list[Passage]:
    """Return the best ``query.k`` documents of the tables, best first."""
    nearest, matching = await _rankings(shards, query)
    ranked = rank(query.mode, nearest, matching, query.k)
    documents = await _read([hit for _, hit in ranked])
    return [_passage(documents[hit.id], score) for score, hit in ranked]


async def candidates(shards: Sequence[AsyncTable], query: Query) -> Candidates:
    """Return what is needed of these tables to find the best ``query.k`` documents of them and others."""
    enough = depth(query.mode, query.k)
    nearest, matching = (merge(rankings, enough) for rankings in await _rankings(shards, query))
    documents = await _read(list({hit.id: hit for hit in [*nearest, *matching]}.values()))
    return Candidates(
        nearest=[_passage(documents[hit.id], hit.score) for hit in nearest],
        matching=[_passage(documents[hit.id], hit.score) for hit in matching],
    )


async def documents(shards: Sequence[AsyncTable], condition: str) -> dict[str, Document]:
    """Return the documents of the tables that meet the SQL ``condition``, by their ids."""
    parts = await asyncio.gather(*[tables.documents(table, condition) for table in shards])
    return {document.id: document for part in parts for document in part}


async def opened(shards: Sequence[AsyncTable]) -> Sequence[AsyncTable]:
    """Return the tables themselves, of which each is what it was when it was opened."""
    return shards


async def following(batches: AsyncIterator[T]) -> T | None:
    """Return what comes next; None: nothing."""
    return await anext(batches, None)


async def count(shards: Sequence[AsyncTable]) -> int:
    """Return how many rows the tables have."""
    return sum(await asyncio.gather(*[table.count_rows() for table in shards]))


async def warm(shards: Sequence[AsyncTable]) -> None:
    """Read the indexes of the tables into memory."""
    await asyncio.gather(*map(indexes.warm, shards))


async def _rankings(
    shards: Sequence[AsyncTable], query: Query
) -> tuple[list[list[tables.Hit]], list[list[tables.Hit]]]:
    """Return what the vector finds in each table, and what the text does; nothing for what the mode leaves out."""
    enough, condition = depth(query.mode, query.k), to_sql(query.conditions)
    asked = []
    if query.mode != "text":
        asked += [tables.nearest(table, query.vector, enough, condition) for table in shards]
    by_vector = len(asked)
    if query.mode != "vector":
        asked += [tables.matching(table, query.text, enough, condition) for table in shards]
    found = await asyncio.gather(*asked)
    return found[:by_vector], found[by_vector:]


async def _read(hits: Sequence[tables.Hit]) -> dict[str, Document]:
    documents = {hit.id: hit.document for hit in hits if hit.document is not None}
    by_table: dict[int, list[tables.Hit]] = {}
    for hit in hits:
        if hit.document is None:
            by_table.setdefault(id(hit.table), []).append(hit)
    read = await asyncio.gather(*map(tables.read, by_table.values()))
    return documents | {document.id: document for found in read for document in found}


def _passage(document: Document, score: float) -> Passage:
    return Passage(id=document.id, text=document.text, metadata=dict(document.metadata), score=score)
