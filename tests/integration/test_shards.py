"""Collections of several shards on a real LanceDB in a temporary folder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cluster_tasks.errors import (
    CollectionMismatch,
    CollectionNotFound,
    InvalidArguments,
    LayoutChanged,
    StoreUnavailable,
)
from cluster_tasks.shards import tables
from cluster_tasks.shards.catalogue import Catalogue, Entry, State
from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.layout import Layout, shard_of
from cluster_tasks.shards.store import CollectionStore

MODEL = "model-a"
SHARDS = 4
NUMBER = 60
VECTORS = np.random.default_rng(7).normal(size=(NUMBER, 6))
DOCUMENTS = [Document(id=f"{n:03}", text=f"text {n}", metadata={"n": n}) for n in range(NUMBER)]


@pytest.fixture
def store(tmp_path: Path) -> CollectionStore:
    return CollectionStore(str(tmp_path / "data"), shards=SHARDS)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """The tables of ``store``."""
    return Database(str(tmp_path / "data"))


@pytest.fixture
def filled(store: CollectionStore) -> CollectionStore:
    assert store.upsert("docs", DOCUMENTS, VECTORS, MODEL) == NUMBER
    return store


def ids(store: CollectionStore, shards: list[int] | None = None) -> list[str]:
    return sorted(passage.id for passage in store.search("docs", VECTORS[0], 1000, shards=shards))


def of_shards(*shards: int) -> list[str]:
    return [document.id for document in DOCUMENTS if shard_of(document.id, SHARDS) in shards]


# Reading and writing.


def test_a_search_over_shards_finds_what_a_search_in_one_finds(filled: CollectionStore, tmp_path: Path) -> None:
    whole = CollectionStore(str(tmp_path / "whole"))
    whole.upsert("docs", DOCUMENTS, VECTORS, MODEL)
    assert (whole.layout("docs").shards, filled.layout("docs").shards) == (1, SHARDS)
    for k in (1, 7, NUMBER, 1000):
        for where in (None, {"n": {"gte": 40}}):
            assert filled.search("docs", VECTORS[3], k, where) == whole.search("docs", VECTORS[3], k, where)


def test_equally_near_documents_of_all_shards_come_in_the_order_of_their_ids(store: CollectionStore) -> None:
    store.upsert("docs", DOCUMENTS, np.ones((NUMBER, 6)), MODEL)
    found = [passage.id for passage in store.search("docs", np.ones(6), 9)]
    assert found == [document.id for document in DOCUMENTS[:9]]


def test_some_shards_are_searched_counted_and_written_alone(filled: CollectionStore) -> None:
    assert ids(filled, [1]) == of_shards(1)
    assert ids(filled, [0, 3]) == of_shards(0, 3)
    assert ids(filled, []) == []
    assert filled.count("docs", shards=[2]) == len(of_shards(2))
    assert filled.delete("docs", ids=[document.id for document in DOCUMENTS], shards=[2]) == len(of_shards(2))
    assert filled.delete("docs", where={"n": {"gte": 0}}, shards=[1]) == len(of_shards(1))
    assert ids(filled) == of_shards(0, 3)
    assert filled.upsert("docs", DOCUMENTS, VECTORS, MODEL, shards=[1]) == len(of_shards(1))
    assert ids(filled) == of_shards(0, 1, 3)
    assert filled.optimize("docs", shards=[0]) is True
    with pytest.raises(InvalidArguments, match="shards"):
        ids(filled, [SHARDS])


def test_ids_and_metadata_are_scanned_as_they_were_when_it_began(filled: CollectionStore) -> None:
    scan = filled.scan("docs")
    first = next(scan)
    filled.delete("docs", where={"n": {"lt": 50}})
    everything = dict([first, *scan])
    assert everything == {document.id: document.metadata for document in DOCUMENTS}
    assert dict(filled.scan("docs", ["051", "052", "001", "none"], {"n": {"gt": 51}})) == {"052": {"n": 52}}
    assert sorted(name for name, _ in filled.scan("docs", shards=[1])) == [n for n in of_shards(1) if n >= "050"]
    assert list(filled.scan("docs", [])) == []
    with pytest.raises(LayoutChanged):
        next(filled.scan("docs", generation=2))


def test_each_document_lies_in_its_shard(filled: CollectionStore, database: Database) -> None:
    layout = filled.layout("docs")
    for shard in range(SHARDS):
        table = database.open(layout.table(shard))
        assert table is not None
        assert sorted(table.to_arrow()["id"].to_pylist()) == of_shards(shard)
    filled.upsert("docs", DOCUMENTS, VECTORS[::-1], MODEL)
    assert filled.count("docs") == NUMBER


def test_a_generation_that_is_not_the_live_one_is_refused(filled: CollectionStore) -> None:
    live = filled.layout("docs").generation
    assert filled.count("docs", shards=[0], generation=live) == len(of_shards(0))
    for operation in (
        lambda: filled.count("docs", generation=live + 1),
        lambda: filled.search("docs", VECTORS[0], 1, generation=live + 1),
        lambda: filled.delete("docs", ids=["000"], generation=live + 1),
        lambda: filled.upsert("docs", DOCUMENTS, VECTORS, MODEL, generation=live + 1),
    ):
        with pytest.raises(LayoutChanged, match="generation 1, not 2"):
            operation()
    assert filled.count("docs") == NUMBER


def test_models_are_not_mixed_in_different_shards(store: CollectionStore) -> None:
    one, other = (Document(id=of_shards(shard)[0], text="t") for shard in (0, 1))
    store.upsert("docs", [one], np.ones((1, 3)), MODEL)
    with pytest.raises(CollectionMismatch):
        store.upsert("docs", [other], np.ones((1, 3)), "model-b")
    with pytest.raises(CollectionMismatch):
        store.upsert("docs", [other], np.ones((1, 4)), MODEL)
    with pytest.raises(CollectionMismatch):
        store.search("docs", np.ones(4), 1, shards=[1])


# The layout.


def test_the_number_of_shards_is_chosen_when_the_collection_is_made(store: CollectionStore, tmp_path: Path) -> None:
    store.upsert("docs", DOCUMENTS, VECTORS, MODEL, new_shards=7)
    store.upsert("docs", DOCUMENTS, VECTORS, MODEL, new_shards=2)
    assert store.layout("docs") == Layout("docs", 1, 7, MODEL, 6)
    assert CollectionStore(str(tmp_path / "data")).layout("docs").shards == 7
    for wrong in (0, 1025):
        with pytest.raises(InvalidArguments, match="shards"):
            store.upsert("other", DOCUMENTS, VECTORS, MODEL, new_shards=wrong)
        with pytest.raises(InvalidArguments, match="shards"):
            CollectionStore(str(tmp_path / "data"), shards=wrong)


def test_a_collection_made_anew_has_another_generation_and_none_of_the_old_tables(
    filled: CollectionStore, database: Database
) -> None:
    filled.drop("docs")
    assert database.names() == ["_catalogue"]
    with pytest.raises(CollectionNotFound):
        filled.drop("docs")
    filled.upsert("docs", DOCUMENTS[:1], np.ones((1, 3)), "model-b", new_shards=2)
    assert filled.layout("docs") == Layout("docs", 2, 2, "model-b", 3)
    assert filled.count("docs") == 1


def test_files_that_a_drop_has_left_go_with_the_next_one(filled: CollectionStore, database: Database) -> None:
    catalogue = Catalogue(database)
    entry = catalogue.read("docs")
    assert entry is not None
    assert catalogue.change(entry, state=State.DROPPED)
    assert filled.collections() == []
    filled.drop("docs")
    assert database.names() == ["_catalogue"]


def test_a_maker_that_died_midway_is_helped_by_the_next(store: CollectionStore, database: Database) -> None:
    Catalogue(database).add(Entry(Layout("docs", 1, 3, MODEL, 6), State.MAKING))
    database.create("docs.g1.1of3", tables.schema(6, MODEL))
    assert store.collections() == []
    with pytest.raises(CollectionNotFound):
        store.count("docs")
    store.upsert("docs", DOCUMENTS, VECTORS, MODEL)
    assert (store.layout("docs").shards, store.count("docs")) == (3, NUMBER)


def test_a_lost_table_is_unavailable_and_not_empty(filled: CollectionStore, database: Database) -> None:
    database.drop(filled.layout("docs").table(2))
    for operation in (
        lambda: filled.count("docs"),
        lambda: ids(filled),
        lambda: filled.delete("docs", ids=of_shards(2)),
    ):
        with pytest.raises(StoreUnavailable, match=r"docs\.g1\.2of4"):
            operation()
    assert ids(filled, [0, 1, 3]) == of_shards(0, 1, 3)


def test_of_changes_to_one_row_of_the_catalogue_one_is_done(database: Database) -> None:
    catalogue = Catalogue(database)
    entry = Entry(Layout("docs", 1, 1, "it's \\ \"é", 6), State.LIVE)
    assert catalogue.add(entry)
    assert not catalogue.add(entry)
    barrier = threading.Barrier(4, timeout=30)

    def change(_: int) -> bool:
        barrier.wait()
        return catalogue.change(entry, state=State.DROPPED) is not None

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(change, range(4))) == [False, False, False, True]
    changed = Catalogue(database).read("docs")
    assert changed == Entry(entry.layout, State.DROPPED, revision=2)


def test_makers_of_different_numbers_of_shards_agree(tmp_path: Path) -> None:
    barrier = threading.Barrier(4, timeout=30)

    def work(maker: int) -> int:
        store = CollectionStore(str(tmp_path / "data"), shards=maker + 1)
        barrier.wait()
        store.upsert("docs", [DOCUMENTS[maker]], VECTORS[maker : maker + 1], MODEL)
        return store.layout("docs").shards

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1
    assert CollectionStore(str(tmp_path / "data")).count("docs") == 4
