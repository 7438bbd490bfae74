"""Collections whose number of shards changes while they are in use, on a real LanceDB in a temporary folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random

import numpy as np
import pytest

from cluster_tasks.errors import CollectionNotFound, InvalidArguments, LayoutChanged, StoreUnavailable
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.layout import Layout, generations
from cluster_tasks.shards.store import CollectionStore
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
MODEL = "model-a"
WITHIN_S = 120.0
SILENCE_S = 2.0
NUMBER = 400
VECTORS = np.random.default_rng(7).normal(size=(NUMBER, 6))
DOCUMENTS = [Document(id=f"{n:04}", text=f"word{n % 7} text", metadata={"n": n}) for n in range(NUMBER)]


@pytest.fixture
def store(tmp_path: Path) -> CollectionStore:
    store = CollectionStore(str(tmp_path / "data"), shards=2)
    store.upsert("docs", DOCUMENTS, VECTORS, MODEL)
    return store


@pytest.fixture
def hasty(store: CollectionStore, tmp_path: Path) -> CollectionStore:
    """The same collections, for one who takes a split for dead early."""
    assert store.count("docs") == NUMBER
    return CollectionStore(str(tmp_path / "data"), split_silence_s=SILENCE_S)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """The tables of ``store``."""
    return Database(str(tmp_path / "data"))


def entry_of(database: Database) -> Entry:
    entry = Catalogue(database).read("docs")
    assert entry is not None
    return entry


def ids(store: CollectionStore) -> list[str]:
    return sorted(passage.id for passage in store.search("docs", VECTORS[0], 10_000))


def everything() -> list[str]:
    return [document.id for document in DOCUMENTS]


# What a split does.


@pytest.mark.parametrize("shards", [1, 2, 3, 16])
def test_a_split_collection_is_searched_as_before(store: CollectionStore, shards: int) -> None:
    def search() -> list[object]:
        where = {"n": {"gte": 50}}
        return [
            store.search("docs", VECTORS[3], 20, where),
            {passage.id for passage in store.search("docs", text="word3", k=500, where=where)},
            store.count("docs"),
        ]

    before = search()
    assert store.split("docs", shards) == store.layout("docs") == Layout("docs", 2, shards, MODEL, 6)
    assert search() == before
    assert store.upsert("docs", DOCUMENTS[:9], VECTORS[:9], MODEL) == 9
    assert store.delete("docs", ids=["0000", "none"]) == 1
    assert ids(store) == everything()[1:]


def test_readers_that_name_the_old_generation_are_refused(store: CollectionStore) -> None:
    store.split("docs", 3)
    with pytest.raises(LayoutChanged, match="generation 2, not 1"):
        store.search("docs", VECTORS[0], 1, shards=[0], generation=1)
    assert store.count("docs", shards=[2], generation=2) > 0


def test_the_old_tables_go_when_readers_have_had_time(store: CollectionStore, database: Database) -> None:
    store.split("docs", 3)
    store.optimize("docs")
    assert sorted(generations(database.names(), "docs")) == [1, 2]
    store.split("docs", 1)
    store.optimize("docs", kept=timedelta(0))
    assert generations(database.names(), "docs") == {3: ["docs.g3.0of1"]}
    assert ids(store) == everything()


def test_a_reader_whose_tables_have_gone_begins_anew(store: CollectionStore, tmp_path: Path) -> None:
    stop = threading.Event()

    def search() -> int:
        own, searches = CollectionStore(str(tmp_path / "data")), 0
        while not stop.is_set():
            assert len(own.search("docs", VECTORS[0], 10_000)) == NUMBER
            searches += 1
        return searches

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(search) for _ in range(2)]
        for shards in (1, 3, 2, 4):
            store.split("docs", shards)
            store.optimize("docs", kept=timedelta(0))
        stop.set()
        assert all(reader.result(timeout=WITHIN_S) for reader in readers)


def test_what_cannot_be_split_is_refused(store: CollectionStore) -> None:
    with pytest.raises(CollectionNotFound):
        store.split("none", 2)
    for wrong in (0, 1025):
        with pytest.raises(InvalidArguments, match="shards"):
            store.split("docs", wrong)
    assert store.layout("docs").generation == 1


def test_splits_at_once_come_one_after_the_other(store: CollectionStore, database: Database) -> None:
    with ThreadPoolExecutor(3) as pool:
        layouts = list(pool.map(lambda shards: store.split("docs", shards), (3, 4, 5)))
    assert sorted(layout.generation for layout in layouts) == [2, 3, 4]
    assert ids(store) == everything()
    store.optimize("docs", kept=timedelta(0))
    assert set(database.names()) == {"_catalogue", *map(store.layout("docs").table, range(store.layout("docs").shards))}


# Writers.


def test_writers_searches_and_splits_at_once_lose_nothing(store: CollectionStore, tmp_path: Path) -> None:
    stop = threading.Event()

    def write(writer: int) -> dict[str, str]:
        """Each has ids of its own, and returns what it was told is stored."""
        own, random, stored, turn = CollectionStore(str(tmp_path / "data")), Random(writer), dict[str, str](), 0
        while not stop.is_set():
            turn += 1
            names = [f"{writer}-{random.randrange(60)}" for _ in range(5)]
            if random.random() < 0.3:
                own.delete("docs", ids=names)
                for name in names:
                    stored.pop(name, None)
            else:
                texts = dict.fromkeys(names, f"turn {turn}")
                documents = [Document(id=name, text=text) for name, text in texts.items()]
                own.upsert("docs", documents, np.ones((len(texts), 6)), MODEL)
                stored |= texts
        return stored

    def search() -> int:
        own, searches = CollectionStore(str(tmp_path / "data")), 0
        while not stop.is_set():
            found = {passage.id for passage in own.search("docs", VECTORS[0], 10_000)}
            assert found >= set(everything())
            searches += 1
        return searches

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, writer) for writer in range(3)]
        reader = pool.submit(search)
        for shards in (3, 1, 4, 2, 3):
            store.split("docs", shards)
        stop.set()
        expected = {document.id: document.text for document in DOCUMENTS}
        for writer in writers:
            expected |= writer.result(timeout=WITHIN_S)
        assert reader.result(timeout=WITHIN_S) > 0
    found = store.search("docs", np.ones(6), 10_000)
    assert {passage.id: passage.text for passage in found} == expected
    assert store.count("docs") == len(expected), "no document is there twice"


def test_a_writer_waits_for_a_split_and_writes_to_the_new_tables(store: CollectionStore, database: Database) -> None:
    catalogue = Catalogue(database)
    announced = catalogue.change(entry_of(database), state=State.SPLITTING, newest=2)
    assert announced
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.upsert, "docs", [Document(id="new", text="t")], np.ones((1, 6)), MODEL)
        for _ in range(5):
            announced = catalogue.change(announced)
            assert announced, "who beats is not broken off"
            assert not writing.done()
            assert ids(store) == everything()
            time.sleep(0.2)
        assert catalogue.change(announced, state=State.LIVE)
        assert writing.result(timeout=WITHIN_S) == 1
    assert "new" in ids(store)


def test_a_drop_ends_a_split(store: CollectionStore, database: Database) -> None:
    many = [Document(id=f"many-{n}", text="t") for n in range(5_000)]
    store.upsert("docs", many, np.ones((len(many), 6)), MODEL)
    with ThreadPoolExecutor(1) as pool:
        splitting = pool.submit(store.split, "docs", 40)
        wait_until(lambda: entry_of(database).state is State.SPLITTING, WITHIN_S)
        store.drop("docs")
        with pytest.raises(StoreUnavailable):
            splitting.result(timeout=WITHIN_S)
    store.upsert("docs", DOCUMENTS[:3], VECTORS[:3], MODEL)
    store.optimize("docs", kept=timedelta(0))
    assert (ids(store), store.layout("docs").generation) == (["0000", "0001", "0002"], 3)
    assert set(database.names()) == {"_catalogue", "docs.g3.0of2", "docs.g3.1of2"}


# Splitters that die.

SPLITTER = f"""
import sys
from cluster_tasks.errors import StoreUnavailable
from cluster_tasks.shards.store import CollectionStore

try:
    CollectionStore(sys.argv[1], split_silence_s={SILENCE_S}).split("docs", 24)
except StoreUnavailable as exc:
    sys.exit("broken off" if "broken off" in str(exc) else str(exc))
"""


@contextmanager
def splitter(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SPLITTER, str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as p:
        try:
            yield p
        finally:
            p.kill()


def is_announced(database: Database) -> bool:
    return entry_of(database).state is State.SPLITTING


def has_tables(database: Database) -> bool:
    return len(generations(database.names(), "docs").get(2, [])) > 5


def has_rows(database: Database) -> bool:
    tables = map(database.open, generations(database.names(), "docs").get(2, []))
    return any(table.count_rows() for table in tables if table is not None)


def is_switched(database: Database) -> bool:
    return entry_of(database).layout.generation == 2


@pytest.mark.parametrize("reached", [is_announced, has_tables, has_rows, is_switched])
def test_a_split_that_is_killed_leaves_one_layout_whole(
    hasty: CollectionStore, database: Database, tmp_path: Path, reached: Callable[[Database], bool]
) -> None:
    with splitter(tmp_path / "data") as process:
        wait_until(lambda: reached(database), WITHIN_S)
        process.kill()
    assert ids(hasty) == everything()
    # Also while the split is thought to go on.
    hasty.optimize("docs", kept=timedelta(0))
    assert ids(hasty) == everything()
    hasty.upsert("docs", [Document(id="new", text="t")], np.ones((1, 6)), MODEL)
    hasty.delete("docs", ids=["0007"])
    assert ids(hasty) == sorted({*everything(), "new"} - {"0007"})
    hasty.optimize("docs", kept=timedelta(0))
    assert set(database.names()) == {"_catalogue", *map(hasty.layout("docs").table, range(hasty.layout("docs").shards))}
    assert hasty.split("docs", 3).generation == 3
    assert ids(hasty) == sorted({*everything(), "new"} - {"0007"})


def test_a_split_that_slept_for_too_long_is_broken_off_and_refused(
    hasty: CollectionStore, database: Database, tmp_path: Path
) -> None:
    with splitter(tmp_path / "data") as process:
        wait_until(lambda: is_announced(database), WITHIN_S)
        os.kill(process.pid, signal.SIGSTOP)
        before = entry_of(database)
        try:
            hasty.upsert("docs", [Document(id="new", text="t")], np.ones((1, 6)), MODEL)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        _, said = process.communicate(timeout=WITHIN_S)
        assert (before.state, process.returncode) == (State.SPLITTING, 1), said
        assert said.strip() == "broken off"
    assert hasty.layout("docs").generation == 1
    assert ids(hasty) == [*everything(), "new"]
    assert set(database.names()) == {"_catalogue", "docs.g1.0of2", "docs.g1.1of2"}
