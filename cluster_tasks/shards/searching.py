"""What is searched for, and how the tables of several shards are asked for it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self, get_args

import numpy as np
from numpy.typing import NDArray

from cluster_tasks.errors import InvalidArguments, did_you_mean
from cluster_tasks.shards import tables
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Candidates, Document, Mode, Passage
from cluster_tasks.shards.filters import Where, compile_where
from cluster_tasks.shards.fusion import depth, merge, rank

if TYPE_CHECKING:
    from lancedb.table import Table

MAX_K = 10_000


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for."""

    mode: Mode
    k: int
    vector: NDArray[np.float32]
    """Of length 1; empty where the mode needs none."""
    text: str
    condition: str
    """SQL that documents must meet; empty: none."""

    @classmethod
    def of(
        cls, vector: tables.Vectors | None, text: str | None, k: int, where: Where | None, mode: Mode | None
    ) -> Self:
        """Check what was asked for. ``mode`` None: what there is to search with decides. Raises InvalidArguments."""
        if not 1 <= k <= MAX_K:
            raise InvalidArguments(f"k={k} is not between 1 and {MAX_K}")
        if mode is None:
            mode = "hybrid" if vector is not None and text else "text" if vector is None else "vector"
        if mode not in get_args(Mode):
            raise InvalidArguments(f"unknown mode {mode!r}{did_you_mean(str(mode), get_args(Mode))}")
        if mode != "text" and vector is None:
            raise InvalidArguments(f"mode={mode!r} needs a vector")
        if mode != "vector":
            _check_text(mode, text)
        array = np.zeros((1, 0)) if mode == "text" or vector is None else np.asarray(vector)[np.newaxis]
        unit = array[0].astype(np.float32) if mode == "text" else tables.unit_rows(array, rows=1)[0]
        return cls(mode, k, unit, text or "", compile_where(where or {}))


def _check_text(mode: Mode, text: str | None) -> None:
    if not text:
        raise InvalidArguments(f"mode={mode!r} needs a text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArguments(f"text: {exc}") from None


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
    enough = depth(query.mode, query.k)
    asked: list[Callable[[], list[tables.Hit]]] = []
    if query.mode != "text":
        asked += [partial(tables.nearest, table, query.vector, enough, query.condition) for table in shards]
    by_vector = len(asked)
    if query.mode != "vector":
        asked += [partial(tables.matching, table, query.text, enough, query.condition) for table in shards]
    found = database.map(lambda search: search(), asked)
    return found[:by_vector], found[by_vector:]


def _read(database: Database, hits: Sequence[tables.Hit]) -> dict[str, Document]:
    by_table: dict[int, list[tables.Hit]] = {}
    for hit in hits:
        by_table.setdefault(id(hit.table), []).append(hit)
    read = database.map(tables.read, by_table.values())
    return {document.id: document for documents in read for document in documents}


def _passage(document: Document, score: float) -> Passage:
    return Passage(id=document.id, text=document.text, metadata=dict(document.metadata), score=score)
