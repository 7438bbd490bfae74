"""What every store of collections does, whatever engine keeps them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster_tasks.errors import CollectionMismatch, CollectionNotFound, InvalidArguments
from cluster_tasks.shards.documents import MAX_INTEGER, Document
from cluster_tasks.shards.filters import MAX_CONDITIONS
from cluster_tasks.shards.vector_store import VectorStore

MODEL = "model-a"
HOSTILE = [
    "it's",
    "' OR 1=1 --",
    "a\\' OR ''='",
    "\\",
    '"',
    "\0",
    "%",
    "é\u2028😀",
    "",
    "');DROP TABLE docs;--",
    "x\ny",
]


values = (
    st.text()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
)


def refill(store: VectorStore, documents: Sequence[Document], vectors: NDArray[Any]) -> None:
    if "docs" in store.collections():
        store.drop("docs")
    store.upsert("docs", documents, vectors, MODEL)


def add(store: VectorStore, *documents: Document, collection: str = "docs") -> int:
    return store.upsert(collection, documents, np.ones((len(documents), 3)), MODEL)


def found_ids(store: VectorStore, where: dict[str, Any] | None = None) -> set[str]:
    return {passage.id for passage in store.search("docs", np.ones(3), 1000, where)}


def number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_a_document_comes_back_as_it_was_stored(store: VectorStore) -> None:
    metadata: dict[str, Any] = {
        "s": "it's \0 \\ é😀",
        "i": MAX_INTEGER,
        "f": 0.1,
        "whole": 2020.0,
        "t": True,
        "ключ 1": "",
        "n": -1,
    }
    add(store, Document(id="it's", text="line\n\0 '\\ 😀", metadata=metadata))
    (passage,) = store.search("docs", np.ones(3), 5)
    assert (passage.id, passage.text, passage.metadata) == ("it's", "line\n\0 '\\ 😀", metadata)
    assert [type(value) for value in passage.metadata.values()].count(bool) == 1


def test_documents_are_got_by_their_ids_in_that_order(store: VectorStore) -> None:
    names = filter(None, ["a", "b", *HOSTILE])
    documents = [Document(id=name, text=f"text of {name}", metadata={"n": n}) for n, name in enumerate(names)]
    add(store, *documents)
    wanted = [document.id for document in reversed(documents)]
    assert store.get("docs", [*wanted, "unknown", wanted[0]]) == documents[::-1]
    assert store.get("docs", []) == []
    with pytest.raises(CollectionNotFound):
        store.get("nowhere", ["a"])


# Search.


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60), dimensions=st.integers(1, 40), k=st.integers(1, 70))
def test_a_search_finds_what_numpy_finds(any_store: VectorStore, seed: int, rows: int, dimensions: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, query = rng.normal(size=(rows, dimensions)).astype(np.float32), rng.normal(size=dimensions)
    refill(any_store, [Document(id=f"{row:03}", text="t") for row in range(rows)], vectors)
    cosine = vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
    passages = any_store.search("docs", query, k)
    assert len({passage.id for passage in passages}) == min(k, rows)
    assert [passage.score for passage in passages] == pytest.approx(np.sort(cosine)[::-1][:k], abs=1e-5)
    assert [cosine[int(passage.id)] for passage in passages] == pytest.approx([p.score for p in passages], abs=1e-5)
    assert all(-1 <= passage.score <= 1 for passage in passages)


def test_equally_near_documents_come_in_the_order_of_their_ids(store: VectorStore) -> None:
    ids = [f"{number:03}" for number in np.random.default_rng(1).permutation(200)]
    vectors = np.tile([0.0, 1.0, 0.0], (200, 1))
    vectors[ids.index("150")] = [1.0, 0.0, 0.0]
    store.upsert("docs", [Document(id=name, text="t") for name in ids], vectors, MODEL)
    found = [passage.id for passage in store.search("docs", np.array([1.0, 0.5, 0.0]), 4)]
    assert found == ["150", "000", "001", "002"]


def test_a_zero_vector_scores_zero_with_every_other(store: VectorStore) -> None:
    store.upsert("docs", [Document(id=name, text="t") for name in "abc"], np.array([[0, 0], [1, 0], [-2, 0]]), MODEL)
    scores = {passage.id: passage.score for passage in store.search("docs", np.array([3.0, 0.0]), 3)}
    assert scores == pytest.approx({"b": 1, "a": 0, "c": -1})
    assert {passage.score for passage in store.search("docs", np.zeros(2), 3)} == {0}


@pytest.mark.parametrize("k", [0, -1, 10_001])
def test_a_k_out_of_range_is_refused(store: VectorStore, k: int) -> None:
    add(store, Document(text="t"))
    with pytest.raises(InvalidArguments, match="k="):
        store.search("docs", np.ones(3), k)


# Filters.


def test_operators_choose_what_they_say(store: VectorStore) -> None:
    years: dict[str, Any] = {"a": 2019, "b": 2020, "c": 2021.5, "d": "2020", "e": True}
    add(store, *(Document(id=name, text="t", metadata={"year": year}) for name, year in years.items()))
    add(store, Document(id="f", text="t"))
    cases: dict[str, Any] = {
        "b": 2020,
        "bc": {"gte": 2020},
        "c": {"gt": 2020, "lte": 2021.5},
        "ab": {"lt": 2021},
        "d": "2020",
        "e": True,
        "": False,
        "bde": {"in": [2020, "2020", True, "no"]},
        "acdef": {"ne": 2020},
    }
    assert {ids: "".join(sorted(found_ids(store, {"year": case}))) for ids, case in cases.items()} == {
        i: i for i in cases
    }
    assert found_ids(store, {"year": {"in": []}}) == set()
    assert found_ids(store, {}) == set("abcdef")


@settings(max_examples=25, deadline=None)
@given(stored=st.lists(values, min_size=1, max_size=8), operand=values, wanted=st.lists(values, max_size=3))
def test_a_filter_agrees_with_python(
    any_store: VectorStore, stored: list[Any], operand: Any, wanted: list[Any]
) -> None:
    documents = [Document(id=str(row), text="t", metadata={"k": value}) for row, value in enumerate(stored)]
    refill(any_store, documents, np.ones((len(stored), 3)))

    def kind(value: object) -> object:
        return "number" if number(value) else type(value)

    def chosen(matches: Callable[[Any], bool]) -> set[str]:
        return {str(row) for row, value in enumerate(stored) if matches(value)}

    def equal(value: Any, other: Any) -> bool:
        return kind(value) == kind(other) and bool(value == other)

    choices = [*wanted, stored[0]]
    assert found_ids(any_store, {"k": operand}) == chosen(lambda value: equal(value, operand))
    assert found_ids(any_store, {"k": stored[0]}) == chosen(lambda value: equal(value, stored[0]))
    assert found_ids(any_store, {"k": {"in": choices}}) == chosen(lambda value: any(equal(value, w) for w in choices))
    if number(operand):
        below = chosen(lambda value: kind(value) == kind(operand) and value < operand)
        assert found_ids(any_store, {"k": {"lt": operand}}) == below


def test_hostile_values_are_compared_and_not_run(store: VectorStore) -> None:
    add(store, *(Document(id=f"{row}", text="t", metadata={"k": value}) for row, value in enumerate(HOSTILE)))
    for row, value in enumerate(HOSTILE):
        assert found_ids(store, {"k": value}) == {str(row)}
        assert found_ids(store, {"k": {"in": [value]}}) == {str(row)}
    assert found_ids(store, {"k": {"in": HOSTILE}}) == {str(row) for row in range(len(HOSTILE))}


@pytest.mark.parametrize(
    "where",
    [
        "k = 1",
        {"it's": 1},
        {"": 1},
        {"k') OR true --": 1},
        {"k\n": 1},
        {5: 1},
        {"k": None},
        {"k": [1]},
        {"k": {}},
        {"k": {"or": 1}},
        {"k": {"gt": True}},
        {"k": {"gt": None}},
        {"k": {"in": "text"}},
        {"k": {"in": [None]}},
        {"k": {"eq": {"eq": 1}}},
        {"k": float("inf")},
        {"k": MAX_INTEGER + 1},
        {"k": "\ud800"},
        {f"k{number}": 1 for number in range(MAX_CONDITIONS + 1)},
    ],
)
def test_a_malformed_filter_is_refused(store: VectorStore, where: Any) -> None:
    add(store, Document(text="t", metadata={"k": 1}))
    with pytest.raises(InvalidArguments, match="where"):
        store.search("docs", np.ones(3), 1, where)
    with pytest.raises(InvalidArguments, match="where"):
        store.delete("docs", where=where)
    assert store.count("docs") == 1


def test_the_filter_with_most_conditions_runs(store: VectorStore) -> None:
    metadata = {f"k{number}": number for number in range(MAX_CONDITIONS)}
    add(store, Document(id="a", text="t", metadata=metadata), Document(id="b", text="t"))
    assert found_ids(store, dict(metadata)) == {"a"}


def test_the_nearest_of_those_that_match_are_found_however_far(store: VectorStore) -> None:
    angles = np.linspace(0, 3, 400)
    documents = [Document(id=f"{row:03}", text="t", metadata={"far": row >= 390}) for row in range(400)]
    store.upsert("docs", documents, np.column_stack([np.cos(angles), np.sin(angles)]), MODEL)
    found = [passage.id for passage in store.search("docs", np.array([1.0, 0.0]), 5, {"far": True})]
    assert found == ["390", "391", "392", "393", "394"]


# Upsert and delete.


def test_a_repeated_upsert_changes_nothing(store: VectorStore) -> None:
    documents = [Document(text=f"text {number}", metadata={"n": number}) for number in range(10)]
    vectors = np.random.default_rng(0).normal(size=(10, 4))
    assert store.upsert("docs", documents, vectors, MODEL) == 10
    before = store.search("docs", vectors[0], 10)
    assert store.upsert("docs", documents, vectors, MODEL) == 10
    assert store.search("docs", vectors[0], 10) == before


def test_an_upsert_replaces_text_metadata_and_vector(store: VectorStore) -> None:
    store.upsert("docs", [Document(id="a", text="old", metadata={"v": 1})], np.array([[1, 0]]), MODEL)
    store.upsert("docs", [Document(id="a", text="new", metadata={"w": 2})], np.array([[0, 1]]), MODEL)
    (passage,) = store.search("docs", np.array([0, 1]), 5)
    assert (passage.text, passage.metadata) == ("new", {"w": 2})
    assert passage.score == pytest.approx(1)
    assert store.search("docs", np.array([0, 1]), 5, {"v": 1}) == []


def test_of_documents_with_one_id_in_a_batch_the_last_wins(store: VectorStore) -> None:
    assert add(store, *(Document(id="a", text=text) for text in ("one", "two")), Document(id="b", text="b")) == 2
    assert [passage.text for passage in store.search("docs", np.ones(3), 5)] == ["two", "b"]


def test_an_upsert_of_nothing_makes_no_collection(store: VectorStore) -> None:
    assert add(store) == 0
    assert store.collections() == []


def test_documents_are_deleted_by_id_by_filter_and_by_both(store: VectorStore) -> None:
    add(store, *(Document(id=name, text="t", metadata={"n": n}) for n, name in enumerate(["a", "b", "c", "it's", "e"])))
    assert store.delete("docs", ids=["it's", "missing"]) == 1
    assert store.delete("docs", where={"n": {"lt": 2}}) == 2
    assert store.delete("docs", ids=["c", "e"], where={"n": 4}) == 1
    assert store.delete("docs", ids=[]) == 0
    assert store.delete("docs", ids=HOSTILE) == 0
    assert found_ids(store) == {"c"}


@pytest.mark.parametrize("where", [None, {}])
def test_a_delete_of_everything_by_oversight_is_refused(store: VectorStore, where: dict[str, Any] | None) -> None:
    add(store, Document(text="t"))
    with pytest.raises(InvalidArguments, match="drop"):
        store.delete("docs", where=where)
    assert store.count("docs") == 1


@pytest.mark.parametrize(
    "vectors",
    [np.ones((2, 3)), np.ones(3), np.ones((1, 0)), np.array([[1, np.nan]]), np.array([[np.inf, 1]])],
)
def test_vectors_that_do_not_fit_the_documents_are_refused(store: VectorStore, vectors: NDArray[Any]) -> None:
    with pytest.raises(InvalidArguments, match="vectors"):
        store.upsert("docs", [Document(text="t")], vectors, MODEL)
    assert store.collections() == []


# Collections.


def test_another_dimension_or_model_is_refused_with_both_named(store: VectorStore) -> None:
    add(store, Document(text="t"))
    with pytest.raises(CollectionMismatch, match=r"3 dimensions by 'model-a'; got 4 dimensions by 'model-a'"):
        store.upsert("docs", [Document(text="u")], np.ones((1, 4)), MODEL)
    with pytest.raises(CollectionMismatch, match=r"3 dimensions by 'model-a'; got 3 dimensions by 'model-b'"):
        store.upsert("docs", [Document(text="u")], np.ones((1, 3)), "model-b")
    with pytest.raises(CollectionMismatch, match=r"3 dimensions by 'model-a'; got 2 dimensions"):
        store.search("docs", np.ones(2), 1)
    with pytest.raises(CollectionMismatch, match="model-b"):
        store.search("docs", np.ones(3), 1, embedding_model="model-b")
    assert len(store.search("docs", np.ones(3), 1, embedding_model=MODEL)) == store.count("docs") == 1


def test_an_unknown_collection_is_answered_with_the_nearest(store: VectorStore) -> None:
    add(store, Document(text="t"), collection="papers")
    operations: list[Callable[[], object]] = [
        lambda: store.search("paper", np.ones(3), 1),
        lambda: store.count("paper"),
        lambda: store.delete("paper", ids=["a"]),
        lambda: store.drop("paper"),
        lambda: store.optimize("paper"),
    ]
    for operation in operations:
        with pytest.raises(CollectionNotFound, match="'paper'; did you mean 'papers'"):
            operation()


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", "/etc", "a.b", "A", "a" * 65, "-a", "a\0", "a\n", "é", ".", "a b"]
)
def test_a_name_that_is_no_collections_is_refused(store: VectorStore, name: str) -> None:
    for operation in (lambda: add(store, Document(text="t"), collection=name), lambda: store.drop(name)):
        with pytest.raises(InvalidArguments, match="collection"):
            operation()
    assert store.collections() == []


def test_collections_are_listed_and_dropped(store: VectorStore) -> None:
    for name in ("b", "a-1", "c_2"):
        add(store, Document(text="t"), collection=name)
    store.drop("b")
    assert store.collections() == ["a-1", "c_2"]


def test_a_collection_made_anew_has_nothing_of_the_old(store: VectorStore) -> None:
    add(store, Document(id="old", text="t"))
    store.drop("docs")
    store.upsert("docs", [Document(id="new", text="t")], np.ones((1, 5)), "model-b")
    assert [passage.id for passage in store.search("docs", np.ones(5), 5)] == ["new"]


def test_a_scan_tells_ids_and_metadata_of_those_that_are_chosen(store: VectorStore) -> None:
    add(store, *(Document(id=f"{n:04}", text="t", metadata={"n": n, "even": n % 2 == 0}) for n in range(1_500)))
    assert dict(store.scan("docs")) == {f"{n:04}": {"n": n, "even": n % 2 == 0} for n in range(1_500)}
    assert dict(store.scan("docs", ["0003", "0004", "none"])) == {
        "0003": {"n": 3, "even": False}, "0004": {"n": 4, "even": True},
    }  # fmt: skip
    assert dict(store.scan("docs", ["0003", "0004"], {"even": True})) == {"0004": {"n": 4, "even": True}}
    assert [name for name, _ in store.scan("docs", where={"n": {"lt": 2}, "even": False})] == ["0001"]
    assert list(store.scan("docs", [])) == []
    with pytest.raises(CollectionNotFound, match="did you mean 'docs'"):
        list(store.scan("doc"))


# Threads.


def test_threads_share_a_store(store: VectorStore) -> None:
    barrier = threading.Barrier(4, timeout=30)

    def work(thread: int) -> set[int]:
        barrier.wait()
        for turn in range(5):
            add(store, Document(id=f"{thread}-{turn}", text="t"), Document(id=f"shared-{turn}", text="t"))
        return {len(store.search("docs", np.ones(3), 3)), store.count("docs") >= 10}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [{3, True}] * 4
    assert store.count("docs") == len(found_ids(store)) == 25


def test_all_makers_of_one_collection_write_to_it(store: VectorStore) -> None:
    barrier = threading.Barrier(6, timeout=30)

    def work(maker: int) -> None:
        for turn in range(5):
            barrier.wait()
            add(store, Document(id=str(maker), text="t"), collection=f"made-{turn}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert [store.count(name) for name in store.collections()] == [6] * 5
