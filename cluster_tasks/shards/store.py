"""Collections of documents, one LanceDB table each, below a folder or URL that all nodes reach."""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cluster_tasks.errors import (
    ClusterError,
    CollectionNotFound,
    ConfigurationError,
    InvalidArguments,
    StoreUnavailable,
    did_you_mean,
)
from cluster_tasks.shards import tables
from cluster_tasks.shards.documents import Document, Passage
from cluster_tasks.shards.filters import Where, any_of, compile_where, quote

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.db import DBConnection
    from lancedb.table import Table

COLLECTION = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_K = 10_000
VERSIONS_PER_COMPACTION = 50
KEPT_VERSIONS = timedelta(minutes=10)
"""Old versions live so long, far longer than an operation reads one."""
METADATA_CACHE_BYTES = 64 << 20
"""Of each process. LanceDB's own limit is 1 GiB, and old versions fill it."""
COMMIT_ATTEMPTS = 8
"""LanceDB itself tries up to ten times within each."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def check_collection(name: str) -> str:
    """Return ``name`` if it can name a collection. Raises InvalidArguments."""
    if not COLLECTION.fullmatch(name):
        raise InvalidArguments(f"collection {name!r} does not match {COLLECTION.pattern}")
    return name


class CollectionStore:
    """The collections below ``data_dir``. Threads may share one. It may be made before a fork, but not used:
    a child of a process that used it is refused with StoreUnavailable.

    Every operation opens its table anew, in about a millisecond, so it sees all that was committed before it began.
    Any operation may raise StoreUnavailable. Making a store raises ConfigurationError if LanceDB is not installed.
    """

    def __init__(self, data_dir: str) -> None:
        if find_spec("lancedb") is None:
            raise ConfigurationError("collections need LanceDB: install cluster-tasks[retrieval]")
        self._uri = data_dir if "://" in data_dir else str(Path(data_dir).absolute())
        self._connection_of: tuple[int, DBConnection] | None = None

    def upsert(
        self, collection: str, documents: Sequence[Document], vectors: tables.Vectors, embedding_model: str
    ) -> int:
        """Insert documents, or replace those of the same id, in one commit; return how many.

        ``vectors`` has the shape (documents, dimensions). Of documents with one id the last wins. The first
        upsert makes the collection. Raises CollectionMismatch for another embedding model or dimension.
        """
        check_collection(collection)
        if not documents:
            return 0
        units = tables.unit_rows(vectors, rows=len(documents))
        last = {document.id: row for row, document in enumerate(documents)}
        rows = tables.rows([documents[row] for row in last.values()], units[list(last.values())], embedding_model)
        self._ensure(collection, rows.schema)
        version = self._commit(collection, lambda table: tables.merge(table, rows))
        self._compact_if_due(collection, version)
        return len(last)

    def delete(self, collection: str, ids: Iterable[str] | None = None, where: Where | None = None) -> int:
        """Delete the documents that have one of ``ids`` and match ``where``, as far as given; return how many."""
        conditions = [] if ids is None else [any_of("id", map(quote, ids))]
        if where:
            conditions.append(compile_where(where))
        if not conditions:
            raise InvalidArguments("delete needs ids or a filter; drop() removes a whole collection")
        result = self._commit(collection, lambda table: table.delete(" AND ".join(conditions)))
        self._compact_if_due(collection, result.version)
        deleted: int = result.num_deleted_rows  # type: ignore[attr-defined]  # LanceDB's stub lacks it.
        return deleted

    def search(
        self,
        collection: str,
        vector: tables.Vectors,
        k: int,
        where: Where | None = None,
        embedding_model: str | None = None,
    ) -> list[Passage]:
        """Return the ``k`` documents nearest to ``vector`` among those that match, nearest first, equals by id.

        ``vector`` has the shape (dimensions,). Raises CollectionMismatch if its dimension, or its
        ``embedding_model`` if named, is not the collection's.
        """
        if not 1 <= k <= MAX_K:
            raise InvalidArguments(f"k={k} is not between 1 and {MAX_K}")
        query = tables.unit_rows(np.asarray(vector)[np.newaxis], rows=1)[0]
        condition = compile_where(where or {})
        table = self._open(collection)
        with _unavailable(collection):
            tables.check_fit(table, len(query), embedding_model)
            return tables.passages(table, tables.nearest(table, query, k, condition))

    def count(self, collection: str) -> int:
        """Return how many documents the collection holds."""
        table = self._open(collection)
        with _unavailable(collection):
            return table.count_rows()

    def collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        with _unavailable(self._uri):
            names = self._connection().list_tables().tables
        return sorted(name for name in names if COLLECTION.fullmatch(name))

    def drop(self, collection: str) -> None:
        """Remove the collection and its documents."""
        self._open(collection)
        with _unavailable(collection):
            self._connection().drop_table(collection)

    def optimize(self, collection: str) -> bool:
        """Compact the table and delete its old versions; return False if a writer came in between.

        A conflict is harmless: a compaction commits as a whole or not at all, and the writers go on with the
        old files. The next one does the work. Rewrites every file of under a million documents.
        """
        table = self._open(collection)
        with _unavailable(collection):
            try:
                table.optimize(cleanup_older_than=KEPT_VERSIONS)
            except RuntimeError as exc:
                if not _is_conflict(exc):
                    raise
                logger.info("compaction lost to a writer", extra={"collection": collection})
                return False
        return True

    def _compact_if_due(self, collection: str, version: int) -> None:
        # Versions are unique, so of all writers one alone meets each multiple.
        if version % VERSIONS_PER_COMPACTION:
            return
        try:
            self.optimize(collection)
        except (CollectionNotFound, StoreUnavailable) as exc:
            # The write is committed: failing it now would only make its caller repeat it.
            logger.warning("compaction failed", extra={"collection": collection}, exc_info=exc)

    def _connection(self) -> DBConnection:
        if self._connection_of is None:
            import lancedb

            session = lancedb.Session(metadata_cache_size_bytes=METADATA_CACHE_BYTES)
            self._connection_of = (os.getpid(), lancedb.connect(self._uri, session=session))
        elif self._connection_of[0] != os.getpid():
            # LanceDB's threads do not survive a fork: a child that goes on crashes now and then, in native code.
            raise StoreUnavailable("the store was used before this process was forked; use it in the child only")
        return self._connection_of[1]

    def _open(self, collection: str) -> Table:
        check_collection(collection)
        with _unavailable(collection):
            try:
                return self._connection().open_table(collection)
            except ValueError as exc:
                # LanceDB has no type for it: its text alone tells.
                if "was not found" not in str(exc):
                    raise
        # A folder of this name may be there: a maker that has not committed, or died before.
        others = (name for name in self.collections() if name != collection)
        raise CollectionNotFound(f"no collection {collection!r}{did_you_mean(collection, others)}")

    def _ensure(self, collection: str, schema: pa.Schema) -> None:
        """Make the collection unless it exists; of several makers at once one wins and the others use its table."""
        try:
            self._open(collection)
        except CollectionNotFound:
            with _unavailable(collection):
                try:
                    self._connection().create_table(collection, schema=schema)
                except ValueError as exc:
                    if "already exists" not in str(exc):
                        raise
                except RuntimeError as exc:
                    # Another maker committed in between: its table is used.
                    if not _is_conflict(exc):
                        raise

    def _commit(self, collection: str, write: Callable[[Table], T]) -> T:
        """Run ``write`` on the newest version until it commits without a conflict; return its result."""
        attempt = 0
        while True:
            table = self._open(collection)
            with _unavailable(collection):
                try:
                    return write(table)
                except RuntimeError as exc:
                    attempt += 1
                    if attempt == COMMIT_ATTEMPTS or not _is_conflict(exc):
                        raise
            time.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))


def _is_conflict(exc: RuntimeError) -> bool:
    # LanceDB has no type for it: "Retryable commit conflict", "Commit conflict", "Too many concurrent writers".
    return re.search(r"commit conflict|concurrent", str(exc), re.IGNORECASE) is not None


@contextmanager
def _unavailable(place: str) -> Iterator[None]:
    """Turn LanceDB's errors, which are Python's general ones, into StoreUnavailable."""
    try:
        yield
    except ClusterError:
        raise
    except (OSError, RuntimeError, ValueError) as exc:
        raise StoreUnavailable(f"{place}: {exc}") from exc
