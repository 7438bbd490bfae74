"""Indexes of vectors on a real LanceDB in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster_tasks.shards.database import Database
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.indexes import GROWTH, INDEX_FROM, vector_indexes
from cluster_tasks.shards.store import CollectionStore

MODEL = "model-a"
DIMENSIONS = 16
ENOUGH = INDEX_FROM + 500
Array = NDArray[np.float32]


def clustered(rows: int, dimensions: int, seed: int) -> Array:
    """Unit vectors around some hundred centres, as those of texts on some hundred subjects are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(300, dimensions))
    vectors = centres[rng.integers(0, len(centres), rows)] + 0.7 * rng.normal(size=(rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(store: CollectionStore, vectors: Array, first: int = 0, batch: int = 10_000) -> None:
    for start in range(0, len(vectors), batch):
        part = vectors[start : start + batch]
        numbers = range(first + start, first + start + len(part))
        documents = [Document(id=f"{n:06}", text="t", metadata={"n": n, "odd": n % 2 == 1}) for n in numbers]
        store.upsert("docs", documents, part, MODEL)


def numbers(store: CollectionStore, query: Array, k: int, where: dict[str, object] | None = None) -> list[int]:
    return [int(passage.id) for passage in store.search("docs", query, k, where)]


def indexes(store: CollectionStore, database: Database) -> list[list[int]]:
    layout = store.layout("docs")
    opened = [database.open(layout.table(shard)) for shard in range(layout.shards)]
    return [vector_indexes(table.list_indices()) for table in opened if table is not None]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        store = CollectionStore(folder)
        fill(store, clustered(ENOUGH, DIMENSIONS, 1))
        store.optimize("docs")
        yield Path(folder)


@pytest.fixture(scope="module")
def indexed(folder: Path) -> CollectionStore:
    """A collection that has an index. What its tests add stays."""
    return CollectionStore(str(folder))


def test_a_small_shard_has_no_index_and_a_large_one_has(tmp_path: Path, indexed: CollectionStore, folder: Path) -> None:
    small = CollectionStore(str(tmp_path), shards=2)
    fill(small, clustered(ENOUGH, DIMENSIONS, 1))
    assert small.optimize("docs")
    assert indexes(small, Database(str(tmp_path))) == [[], []], "each shard is below"
    ((rows,),) = indexes(indexed, Database(str(folder)))
    assert INDEX_FROM <= rows <= ENOUGH


def test_rows_that_came_changed_and_went_after_the_index_are_known(indexed: CollectionStore) -> None:
    added = clustered(50, DIMENSIONS, 2)
    fill(indexed, added, first=900_000)
    changed = clustered(1, DIMENSIONS, 3)
    before = clustered(ENOUGH, DIMENSIONS, 1)[7]
    fill(indexed, changed, first=7)
    indexed.delete("docs", ids=["000009"])
    for _ in range(2):
        assert numbers(indexed, added[4], 1) == [900_004]
        assert numbers(indexed, changed[0], 1) == [7]
        assert 7 not in numbers(indexed, before, 10)
        assert 9 not in numbers(indexed, clustered(ENOUGH, DIMENSIONS, 1)[9], 10)
        assert len(set(numbers(indexed, before, 200))) == 200
        indexed.optimize("docs")


def test_scores_are_exact_and_the_order_is_by_them(indexed: CollectionStore) -> None:
    query = clustered(1, DIMENSIONS, 4)[0]
    vectors = clustered(ENOUGH, DIMENSIONS, 1)
    passages = [each for each in indexed.search("docs", query, 20) if 9 < int(each.id) < ENOUGH]
    assert [each.score for each in passages] == pytest.approx([vectors[int(p.id)] @ query for p in passages], abs=1e-5)
    assert passages == sorted(passages, key=lambda each: (-each.score, each.id))


def test_the_nearest_of_those_that_match_are_found_however_few(indexed: CollectionStore) -> None:
    vectors, query = clustered(ENOUGH, DIMENSIONS, 1), clustered(1, DIMENSIONS, 5)[0]
    for low, high in ((1_000, 1_004), (3_000, 6_000)):
        nearest = low + np.argsort(-(vectors[low:high] @ query), kind="stable")
        where: dict[str, object] = {"n": {"gte": low, "lt": high}}
        assert numbers(indexed, query, 10, where) == nearest[:10].tolist()


def test_as_many_are_found_as_are_wanted(indexed: CollectionStore) -> None:
    query = clustered(1, DIMENSIONS, 6)[0]
    assert len(set(numbers(indexed, query, INDEX_FROM))) == INDEX_FROM
    assert len(numbers(indexed, query, INDEX_FROM // 2, {"odd": True})) == INDEX_FROM // 2
    assert set(numbers(indexed, query, 5, {"n": {"gt": ENOUGH, "lt": 800_000}})) == set()


def test_equals_come_in_the_order_of_their_ids_with_an_index(indexed: CollectionStore) -> None:
    one = -clustered(1, DIMENSIONS, 8)[0]
    fill(indexed, np.tile(one, (40, 1)), first=800_000)
    for _ in range(2):
        assert numbers(indexed, one, 5) == list(range(800_000, 800_005))
        indexed.optimize("docs")


def test_a_table_that_has_grown_gets_a_new_index(tmp_path: Path) -> None:
    store, database = CollectionStore(str(tmp_path)), Database(str(tmp_path))
    fill(store, clustered(INDEX_FROM, 8, 1))
    store.optimize("docs")
    assert indexes(store, database) == [[INDEX_FROM]]
    fill(store, clustered(2 * INDEX_FROM, 8, 2), first=INDEX_FROM)
    store.optimize("docs")
    assert indexes(store, database) == [[INDEX_FROM]]
    fill(store, clustered(INDEX_FROM, 8, 3), first=3 * INDEX_FROM)
    store.optimize("docs")
    assert indexes(store, database) == [[GROWTH * INDEX_FROM]]
    store.warm("docs")
    assert numbers(store, clustered(INDEX_FROM, 8, 3)[5], 1) == [3 * INDEX_FROM + 5]


def test_a_dimension_that_has_no_index_is_searched_exactly(tmp_path: Path) -> None:
    store = CollectionStore(str(tmp_path))
    vectors = clustered(INDEX_FROM, 3, 1)
    fill(store, vectors)
    assert store.optimize("docs")
    assert indexes(store, Database(str(tmp_path))) == [[]]
    passages = store.search("docs", vectors[5], 10)
    assert [passage.score for passage in passages] == pytest.approx(np.sort(vectors @ vectors[5])[::-1][:10], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["clustered", "without structure"])
def test_of_a_hundred_thousand_the_ten_nearest_are_found(tmp_path: Path, noise: str) -> None:
    if noise == "clustered":
        vectors, queries = clustered(100_000, 384, 1), clustered(40, 384, 2)
    else:
        rng = np.random.default_rng(1)
        vectors, queries = (rng.normal(size=(rows, 384)).astype(np.float32) for rows in (100_000, 40))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = CollectionStore(str(tmp_path))
    fill(store, vectors, batch=25_000)
    store.optimize("docs")
    assert indexes(store, Database(str(tmp_path))) != [[]]
    nearest = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = [set(numbers(store, query, 10)) for query in queries]
    recall = np.mean([len(ids & set(truth)) / 10 for ids, truth in zip(found, nearest.tolist(), strict=True)])
    assert recall >= 0.95
