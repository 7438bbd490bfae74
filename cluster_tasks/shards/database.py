"""The LanceDB below a folder or URL: its tables by name, and LanceDB's errors turned into StoreUnavailable."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from cluster_tasks.errors import ClusterError, ConfigurationError, StoreUnavailable

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.db import AsyncConnection, DBConnection
    from lancedb.table import AsyncTable, Table

KEPT_VERSIONS = timedelta(minutes=10)
"""Old versions live so long, far longer than an operation reads one."""
VERSIONS_PER_COMPACTION = 50
CHARACTERS_PER_COMPACTION = 2_000_000
"""Written at once. A search for words reads the texts of rows that no index has yet, 25 ns a character."""
METADATA_CACHE_BYTES = 64 << 20
"""Of each process. LanceDB's own limit is 1 GiB, and old versions fill it."""
INDEX_CACHE_BYTES = 1 << 30
"""Of each process. LanceDB's own limit is 6 GiB."""
COMMIT_ATTEMPTS = 8
"""LanceDB itself tries up to ten times within each."""
THREADS = 8
"""Tables asked at once. LanceDB computes with threads of its own; these wait for it."""

S = TypeVar("S")
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    process: int
    connection: DBConnection
    threads: ThreadPoolExecutor
    asking: AsyncConnection
    loop: asyncio.AbstractEventLoop


class Database:
    """Tables below ``place``. Threads may share one. It may be made before a fork, but not used: a child of a process
    that used it is refused with StoreUnavailable.

    Making one does no I/O, and raises ConfigurationError if LanceDB is not installed. What it does raises
    StoreUnavailable when LanceDB cannot.
    """

    def __init__(self, place: str) -> None:
        if find_spec("lancedb") is None:
            raise ConfigurationError("collections need LanceDB: install cluster-tasks[retrieval]")
        self.place = place if "://" in place else str(Path(place).absolute())
        self._opened: _Opened | None = None
        self._opening = Lock()

    def open(self, name: str) -> Table | None:
        """Return a table as it is now, in about a millisecond; None: there is none of this name."""
        with unavailable(name):
            try:
                return self._connection().open_table(name)
            except ValueError as exc:
                if not is_missing(exc):
                    raise
        return None

    async def open_to_ask(self, name: str) -> AsyncTable | None:
        """Return a table as it is now, for coroutines of ``run``; None: there is none of this name."""
        with unavailable(name):
            try:
                return await self._open().asking.open_table(name)
            except ValueError as exc:
                if not is_missing(exc):
                    raise
        return None

    def run(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what a coroutine returns, which may ask several tables at once: two thirds of what threads cost.

        It shares the loop with those of other threads: what computes long does not belong in it.
        """
        loop = self._open().loop
        asked = asyncio.run_coroutine_threadsafe(ask(), loop)
        try:
            return asked.result()
        except BaseException:
            # A time limit, say, ends the waiting and not what is waited for.
            asked.cancel()
            raise

    def create(self, name: str, schema: pa.Schema) -> None:
        """Make an empty table unless it exists; of several makers at once one wins and the others use its table."""
        with unavailable(name):
            try:
                self._connection().create_table(name, schema=schema)
            except ValueError as exc:
                if "already exists" not in str(exc):
                    raise
            except RuntimeError as exc:
                # Another maker committed in between.
                if not is_conflict(exc):
                    raise

    def drop(self, name: str) -> None:
        """Remove a table and its files. Safe to repeat."""
        with unavailable(name):
            try:
                self._connection().drop_table(name)
            except ValueError as exc:
                if not is_missing(exc):
                    raise

    def names(self) -> list[str]:
        """Return the names of all tables."""
        found: list[str] = []
        with unavailable(self.place):
            page = self._connection().list_tables()
            found += page.tables
            while page.page_token:
                page = self._connection().list_tables(page_token=page.page_token)
                found += page.tables
        return found

    def commit(self, name: str, write: Callable[[Table], T]) -> T:
        """Run ``write`` on the newest version until it commits without a conflict; return its result.

        Raises StoreUnavailable if there is no such table.
        """
        attempt = 0
        while True:
            table = self.open(name)
            if table is None:
                raise StoreUnavailable(f"{name}: no such table")
            with unavailable(name):
                try:
                    return write(table)
                except RuntimeError as exc:
                    attempt += 1
                    if attempt == COMMIT_ATTEMPTS or not is_conflict(exc):
                        raise
            time.sleep(random.uniform(0, min(2.0, 0.05 * 2**attempt)))

    def optimize(self, name: str) -> bool:
        """Compact a table, add its new rows to its indexes, and delete versions that are older than KEPT_VERSIONS.

        Returns False if a writer came in between. That is harmless: a compaction commits as a whole or not at all, and
        the writers go on with the old files. The next one does the work. Rewrites every file of under a million rows.
        """
        table = self.open(name)
        if table is None:
            return False
        with unavailable(name):
            try:
                table.optimize(cleanup_older_than=KEPT_VERSIONS)
            except RuntimeError as exc:
                if not is_conflict(exc):
                    raise
                logger.info("compaction lost to a writer", extra={"table": name})
                return False
        return True

    def compact_if_due(
        self, name: str, version: int, characters: int = 0, compact: Callable[[Database, str], bool] | None = None
    ) -> None:
        """Optimize a table, by ``compact`` if it is given, if a write of so many that made ``version`` makes it due.

        Raises nothing: the write is done, and to fail it now would only make its caller repeat it.
        """
        # Versions are unique, so of all writers one alone meets each multiple.
        if version % VERSIONS_PER_COMPACTION and characters < CHARACTERS_PER_COMPACTION:
            return
        try:
            (compact or Database.optimize)(self, name)
        except StoreUnavailable as exc:
            logger.warning("compaction failed", extra={"table": name}, exc_info=exc)

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return ``function`` of each item, in their order, computed at once by several threads.

        All end before this does; then it raises what the first to fail, in their order, has raised. ``function`` must
        not call this.
        """
        listed = list(items)
        if len(listed) < 2:
            return [function(item) for item in listed]
        started = [self._open().threads.submit(function, item) for item in listed]
        for future in started:
            future.exception()
        return [future.result() for future in started]

    def _connection(self) -> DBConnection:
        return self._open().connection

    def _open(self) -> _Opened:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    self._opened = self._connect()
        if self._opened.process != os.getpid():
            # LanceDB's threads do not survive a fork: a child that goes on crashes now and then, in native code.
            raise StoreUnavailable("the store was used before this process was forked; use it in the child only")
        return self._opened

    def _connect(self) -> _Opened:
        import lancedb

        session = lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)
        loop = asyncio.new_event_loop()
        Thread(target=loop.run_forever, name="shards-asking", daemon=True).start()
        asking = asyncio.run_coroutine_threadsafe(lancedb.connect_async(self.place, session=session), loop).result()
        connection = lancedb.connect(self.place, session=session)
        return _Opened(os.getpid(), connection, ThreadPoolExecutor(THREADS, "shards"), asking, loop)


def is_conflict(exc: Exception) -> bool:
    """Whether a commit of LanceDB failed because another came before it."""
    # LanceDB has no type for it: "Retryable commit conflict", "Commit conflict", "Too many concurrent writers".
    return re.search(r"commit conflict|concurrent", str(exc), re.IGNORECASE) is not None


def is_missing(exc: Exception) -> bool:
    """Whether there is no table of the name."""
    # LanceDB has no type for it: its text alone tells.
    return "was not found" in str(exc)


@contextmanager
def unavailable(place: str) -> Iterator[None]:
    """Turn LanceDB's errors, which are Python's general ones, into StoreUnavailable."""
    try:
        yield
    except ClusterError:
        raise
    except (OSError, RuntimeError, ValueError) as exc:
        raise StoreUnavailable(f"{place}: {exc}") from exc
