"""One writer at a time in each shard, and what a writer may still do whose turn is over.

A lock for each shard keeps writers from losing races against each other. That alone does not stop a writer that was
paused for longer than its lock lasts, so the *token* of the lock, greater for each later holder, is written into every
row. LanceDB compares it in the commit itself, also when it repeats a commit that lost a race:

- a writer never replaces or deletes a row that a later holder has written, however long it slept;
- it is refused with StaleWriter, before it changes anything, if a row of a later holder was there when it began to
  commit; and after the commit, if it was refused rows then.

What is not excluded, because LanceDB has no condition on a whole commit: a writer whose turn ended between that look
and its commit may still insert documents whose ids are new to the shard, or were deleted since; and a holder that only
deleted leaves no token behind.

Without locks, or while their service is away, writers rely on LanceDB alone: commits of two that change the same rows
come one after the other, none is lost, and the later wins. So much is true with locks, too. Readers wait for nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from cluster_tasks.errors import LockLost, LocksUnavailable, StaleWriter
from cluster_tasks.locks import Held, Locks
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.vector_store import Check

if TYPE_CHECKING:
    from lancedb.table import Table

TTL_S = 15.0
"""A commit takes seconds at most; so long a writer that died keeps the others waiting (in Consul up to twice)."""
WAIT_S = 60.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Writers:
    """Who may write to the tables of shards. Threads may share one."""

    def __init__(self, database: Database, locks: Locks | None) -> None:
        self._database, self._locks = database, locks

    def commit(self, name: str, write: Callable[[Table, int | None], T], check: Check | None = None) -> T:
        """Run ``write`` on the newest version of a table until it commits; return its result.

        It is handed the token to write, None without a lock; before that ``check`` is called. Raises LockTaken if
        others write for longer than WAIT_S, LockLost if the lock ended before it could commit, StaleWriter,
        StoreUnavailable, and what ``check`` does.
        """
        with self._turn(name) as held:

            def attempt(table: Table) -> T:
                if held is not None:
                    if held.left_s < TTL_S / 2:
                        held.renew()
                    if later := table.count_rows(f"token > {held.token}"):
                        raise StaleWriter(name, held.token, later)
                if check is not None:
                    check()
                return write(table, held.token if held else None)

            return self._database.commit(name, attempt)

    @contextmanager
    def _turn(self, name: str) -> Iterator[Held | None]:
        held = self._take(name)
        try:
            yield held
        finally:
            if held is not None:
                self._give_back(held)

    def _take(self, name: str) -> Held | None:
        if self._locks is None:
            return None
        try:
            return self._locks.acquire(f"shard/{name}", TTL_S, WAIT_S)
        except LocksUnavailable as exc:
            # Writing goes on without: what the lock adds is not worth an outage.
            logger.warning("a shard is written to without a lock", extra={"table": name, "reason": str(exc)})
            return None

    @staticmethod
    def _give_back(held: Held) -> None:
        try:
            held.release()
        except (LockLost, LocksUnavailable) as exc:
            # What was committed is committed, by the rules above: its caller has nothing to repeat.
            logger.info("lock of a shard not released", extra={"lock": held.name, "reason": str(exc)})
