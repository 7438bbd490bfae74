"""Writers that take turns in a shard by locks in a real service, on a real LanceDB in a temporary folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import LockTaken, StaleCommit, StaleWriter
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks, RedisLocks
from cluster_tasks.shards import tables
from cluster_tasks.shards.database import THREADS, Database
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.store import CollectionStore
from cluster_tasks.shards.writers import Writers
from tests.contract.locking import OpenLocks, Stage
from workers.redis_server import free_port

if TYPE_CHECKING:
    from lancedb.table import Table

MODEL = "model-a"
TABLE = "docs.g1.0of1"
LOCK = f"shard/{TABLE}"


@pytest.fixture
def forget(stage: Stage) -> Callable[[], None]:
    """Let the lock of the shard run out, as it does while its holder is paused."""
    return lambda: stage.forget(LOCK)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(str(tmp_path))


@pytest.fixture
def store(tmp_path: Path, locks: Locks) -> CollectionStore:
    store = CollectionStore(str(tmp_path), locks=locks)
    put(store, a="first")
    return store


def put(store: CollectionStore, **texts: str) -> None:
    documents = [Document(id=name, text=text) for name, text in texts.items()]
    store.upsert("docs", documents, np.ones((len(documents), 3)), MODEL)


def stored(store: CollectionStore) -> dict[str, str]:
    return {passage.id: passage.text for passage in store.search("docs", np.ones(3), 100)}


def paused(
    database: Database, locks: Locks, meanwhile: Callable[[], None], write: Callable[[Table, int | None], object]
) -> object:
    """Let a writer sleep between the look at its turn and its commit."""

    def sleep_and_write(table: Table, token: int | None) -> object:
        meanwhile()
        return write(table, token)

    return Writers(database, locks).commit(TABLE, sleep_and_write)


def merge(**texts: str) -> Callable[[Table, int | None], int]:
    documents = [Document(id=name, text=text) for name, text in texts.items()]
    units = np.ones((len(documents), 3), dtype=np.float32)

    def write(table: Table, token: int | None) -> int:
        assert token is not None
        return tables.merge(table, tables.rows(documents, units, MODEL, token), token)

    return write


def test_writers_take_turns_and_leave_no_lock(
    store: CollectionStore, tmp_path: Path, open_locks: OpenLocks, locks: Locks
) -> None:
    barrier = threading.Barrier(4, timeout=30)

    def work(writer: int) -> None:
        own = CollectionStore(str(tmp_path), locks=open_locks())
        barrier.wait()
        for turn in range(5):
            put(own, **{f"{writer}-{turn}": "own", f"shared-{turn}": str(writer)})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.count("docs") == 1 + 4 * 5 + 5
    locks.acquire(LOCK, ttl_s=30.0, wait_s=0.0).release()


def test_a_writer_that_slept_replaces_nothing_that_a_later_one_has_written(
    store: CollectionStore, database: Database, locks: Locks, forget: Callable[[], None]
) -> None:
    def meanwhile() -> None:
        forget()
        put(store, a="later", b="later")

    with pytest.raises(StaleWriter, match="1 rows were written by holders of its lock that came after"):
        paused(database, locks, meanwhile, merge(a="stale", c="stale"))
    assert stored(store) == {"a": "later", "b": "later", "c": "stale"}, "c was new to the shard: that is not excluded"


def test_a_writer_that_slept_deletes_nothing_that_a_later_one_has_written(
    store: CollectionStore, database: Database, locks: Locks, forget: Callable[[], None]
) -> None:
    put(store, b="first")

    def meanwhile() -> None:
        forget()
        put(store, a="later")

    everything = "id = 'a' OR id = 'b'"
    deleted = paused(database, locks, meanwhile, lambda table, token: tables.delete(table, everything, token)[0])
    assert (deleted, stored(store)) == (1, {"a": "later"})


def test_a_writer_whose_turn_was_over_before_it_began_to_commit_changes_nothing(
    store: CollectionStore, database: Database, locks: Locks, forget: Callable[[], None]
) -> None:
    put(store, b="first")
    attempts: list[int] = []

    def lose_the_race(table: Table, token: int | None) -> int:
        attempts.append(table.version)
        forget()
        put(store, a="later")
        raise RuntimeError("Commit conflict: the next attempt is made on a newer version")

    with pytest.raises(StaleWriter):
        Writers(database, locks).commit(TABLE, lose_the_race)
    assert len(attempts) == 1
    assert stored(store) == {"a": "later", "b": "first"}


def test_whether_a_write_may_still_be_is_asked_under_the_lock_and_ends_it(store: CollectionStore, locks: Locks) -> None:
    def refuse() -> None:
        # Whoever writes from now on does so after this.
        with pytest.raises(LockTaken):
            locks.acquire(LOCK, 1)
        raise StaleCommit("it was taken away")

    with pytest.raises(StaleCommit):
        store.upsert("docs", [Document(id="a", text="second")], np.ones((1, 3)), MODEL, check=refuse)
    with pytest.raises(StaleCommit):
        store.delete("docs", ["a"], check=refuse)
    assert stored(store) == {"a": "first"}
    put(store, a="third")
    assert stored(store) == {"a": "third"}


def test_reads_wait_for_no_writer_that_waits(tmp_path: Path, open_locks: OpenLocks) -> None:
    store = CollectionStore(str(tmp_path), THREADS, open_locks())
    documents = [Document(id=str(number), text=f"text {number}") for number in range(10 * THREADS)]
    store.upsert("docs", documents, np.ones((len(documents), 3)), MODEL)
    names = [store.layout("docs").table(shard) for shard in range(THREADS)]
    of_another = [open_locks().acquire(f"shard/{name}", 60) for name in names]
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(store.upsert, "docs", documents, np.ones((len(documents), 3)), MODEL) for _ in range(2)]
        assert len(store.search("docs", np.ones(3), 5)) == 5
        assert store.count("docs") == len(list(store.scan("docs"))) == len(documents)
        assert len(store.get("docs", ["1", "2"])) == 2
        assert not any(each.done() for each in writing)
        for held in of_another:
            held.release()
        assert [each.result() for each in writing] == [len(documents)] * 2


def test_a_later_holder_replaces_and_deletes_what_earlier_ones_have_written(store: CollectionStore) -> None:
    put(store, a="second", b="first")
    put(store, a="third")
    assert stored(store) == {"a": "third", "b": "first"}
    assert store.delete("docs", ids=["a", "b"]) == 2


def test_rows_without_a_lock_are_anybodys(tmp_path: Path, store: CollectionStore) -> None:
    unlocked = CollectionStore(str(tmp_path))
    put(unlocked, a="unlocked", b="unlocked")
    put(store, b="locked")
    assert stored(store) == {"a": "unlocked", "b": "locked"}


def test_shards_are_written_to_at_the_same_time(tmp_path: Path, locks: Locks) -> None:
    store = CollectionStore(str(tmp_path), shards=2, locks=locks)
    documents = [Document(id=str(n), text="t") for n in range(20)]
    store.upsert("two", documents, np.ones((20, 3)), MODEL)
    with locks.acquire("shard/two.g1.0of2", 60), ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: store.upsert("two", documents, np.ones((20, 3)), MODEL, shards=[1]))
        assert 0 < done.result(timeout=60) < 20
        assert len(store.search("two", np.ones(3), 20)) == 20, "readers wait for nobody"


def test_without_the_service_of_locks_writing_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = Locks(RedisLocks(f"redis://127.0.0.1:{free_port()}/0", Keys("test")), SystemClock())
    store = CollectionStore(str(tmp_path), locks=away)
    put(store, a="unlocked")
    assert stored(store) == {"a": "unlocked"}
    assert "a shard is written to without a lock" in caplog.text
