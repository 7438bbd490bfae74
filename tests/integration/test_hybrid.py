"""Search by words, and by words and vectors together, on a real LanceDB in a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster_tasks.errors import CollectionMismatch, InvalidArguments
from cluster_tasks.shards.documents import Document, Mode
from cluster_tasks.shards.fusion import RRF_K, combine
from cluster_tasks.shards.store import CollectionStore

MODEL = "model-a"
TEXTS = {
    "blue": "The sky is blue because air scatters blue light.",
    "cat": "A cat sleeps for most of the day.",
    "hens": "Hens lay three hundred eggs a year; one hen lays an egg a day.",
    "cafe": "In the CAFÉ they play number 7 of get_user_name.",
}
DIRECTIONS = {"blue": [1.0, 0.0], "cat": [0.8, 0.6], "hens": [0.0, 1.0], "cafe": [-1.0, 0.0]}


@pytest.fixture(params=[1, 3], ids=["one shard", "three shards"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CollectionStore:
    store = CollectionStore(str(tmp_path / "data"), shards=request.param)
    add(store, TEXTS)
    return store


def add(store: CollectionStore, texts: dict[str, str]) -> None:
    documents = [Document(id=name, text=text, metadata={"length": len(text)}) for name, text in texts.items()]
    vectors = np.array([DIRECTIONS.get(name, [0.0, -1.0]) for name in texts])
    store.upsert("docs", documents, vectors, MODEL)


def found(store: CollectionStore, text: str, k: int = 10, where: dict[str, Any] | None = None) -> list[str]:
    return [passage.id for passage in store.search("docs", text=text, k=k, where=where)]


# Words.


def test_words_are_found_in_any_form_case_and_accent(store: CollectionStore) -> None:
    assert found(store, "SKY") == ["blue"]
    assert found(store, "sleeping cats") == ["cat"]
    assert found(store, "cafe") == found(store, "café") == ["cafe"]
    assert found(store, "number 7") == ["cafe"]
    assert found(store, "elephant") == []
    assert found(store, "the of and") == []


def test_who_has_more_of_the_words_comes_first_with_a_higher_score(store: CollectionStore) -> None:
    passages = store.search("docs", text="the day a hen lays eggs", k=10)
    assert [passage.id for passage in passages] == ["hens", "cat"]
    assert passages[0].score > passages[1].score > 0
    assert passages[0].text == TEXTS["hens"]
    assert found(store, "the day a hen lays eggs", k=1) == ["hens"]


def test_rows_are_found_before_and_after_the_index_knows_them(store: CollectionStore) -> None:
    store.optimize("docs")
    assert found(store, "blue") == ["blue"]
    add(store, {"dog": "A dog in a blue coat.", "cat": "A lion."})
    for _ in range(2):
        assert sorted(found(store, "blue")) == ["blue", "dog"]
        assert found(store, "lion") == ["cat"]
        assert found(store, "sleeps") == [], "the text of before is not found any more"
        store.optimize("docs")
    store.delete("docs", ids=["blue"])
    assert found(store, "blue") == ["dog"]


def test_a_filter_chooses_before_the_words_do(store: CollectionStore) -> None:
    add(store, {f"{n:02}": f"blue {'x ' * n}" for n in range(20)})
    assert set(found(store, "blue", k=3, where={"length": {"gte": 39, "lte": 43}})) == {"17", "18", "19"}
    assert found(store, "blue", where={"length": 5.0}) == ["00"]


def test_equally_good_texts_come_in_the_order_of_their_ids(store: CollectionStore) -> None:
    add(store, {f"{n:03}": "one and the same zebra" for n in np.random.default_rng(3).permutation(100)})
    store.optimize("docs")
    if store.layout("docs").shards == 1:  # Each shard counts words for itself.
        assert found(store, "zebra", k=5) == ["000", "001", "002", "003", "004"]
    assert found(store, "zebra", k=100, where={"length": 22}) == found(store, "zebra", k=100)


HOSTILE = [
    '"sky" AND (NOT blue OR', "text:sky*", "sky~2 +blue -air", "sky' OR ''='", '{"match": {"terms": "sky"}}', "sky\\",
    "sky \0", "(((((sky", "sky^9999999999", "[sky TO *]", "sky && || !",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_signs_in_a_query_mean_nothing(store: CollectionStore, text: str) -> None:
    assert "blue" in found(store, text)
    assert [passage.id for passage in store.search("docs", np.array([1.0, 0.0]), 1, text=text)] == ["blue"]


@pytest.mark.parametrize("text", ["'", "\0", "   ", "*", "\\", "a" * 100_000, "的天空", "😀", "\u2028"])
def test_a_query_without_a_word_that_is_known_finds_nothing(store: CollectionStore, text: str) -> None:
    assert found(store, text) == []
    assert len(store.search("docs", np.array([1.0, 0.0]), 9, text=text)) == len(TEXTS)


def test_a_long_question_is_searched_for_with_all_its_words(store: CollectionStore) -> None:
    assert found(store, " ".join(f"word{n}" for n in range(5_000)) + " sky") == ["blue"]


# Both.


def test_hybrid_finds_by_both_and_scores_by_ranks(store: CollectionStore) -> None:
    passages = store.search("docs", np.array([1.0, 0.1]), 10, text="hens eat a cat")
    assert [passage.id for passage in passages] == ["cat", "hens", "blue", "cafe"]
    by_vector = ["blue", "cat", "hens", "cafe"]
    by_words = [passage.id for passage in store.search("docs", text="hens eat a cat")]
    for passage in passages:
        ranks = [ranking.index(passage.id) + 1 for ranking in (by_vector, by_words) if passage.id in ranking]
        assert passage.score == pytest.approx(sum(1 / (RRF_K + rank) for rank in ranks))


def test_the_mode_follows_from_what_is_given_or_is_said(store: CollectionStore) -> None:
    vector, text = np.array([1.0, 0.0]), "hens"
    assert store.search("docs", vector, 2)[0].score == pytest.approx(1)
    assert store.search("docs", vector, 2, text=text, mode="vector") == store.search("docs", vector, 2)
    assert store.search("docs", vector, 2, text=text, mode="text") == store.search("docs", k=2, text=text)
    assert store.search("docs", vector, 2, text=text) == store.search("docs", vector, 2, text=text, mode="hybrid")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "text"), ({"text": ""}, "text"), ({"mode": "vector", "text": "a"}, "vector"),
        ({"mode": "hybrid", "text": "a"}, "vector"), ({"mode": "hybrid", "vector": np.ones(2)}, "text"),
        ({"mode": "text", "vector": np.ones(2)}, "text"), ({"mode": "words", "text": "a"}, "unknown mode"),
        ({"text": "\ud800"}, "text"),
    ],
)  # fmt: skip
def test_a_mode_without_what_it_needs_is_refused(store: CollectionStore, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArguments, match=problem):
        store.search("docs", **given)


def test_another_model_is_refused_unless_no_vector_is_compared(store: CollectionStore) -> None:
    with pytest.raises(CollectionMismatch):
        store.search("docs", np.ones(2), text="sky", embedding_model="model-b")
    assert store.search("docs", text="sky", embedding_model="model-b")


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_nodes_find_apart_is_what_one_finds(tmp_path: Path, mode: Mode, indexed: bool) -> None:
    store = CollectionStore(str(tmp_path / "data"), shards=4)
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(60)]
    documents = [Document(id=f"{n:03}", text=" ".join(rng.choice(words, 12)), metadata={"n": n}) for n in range(300)]
    store.upsert("docs", documents, rng.normal(size=(300, 8)), MODEL)
    if indexed:
        store.optimize("docs")
    query, text, where = rng.normal(size=8), " ".join(words[:5]), {"n": {"gte": 50}}
    for k in (1, 10, 100):
        whole = store.search("docs", query, k, where, text=text, mode=mode)
        parts = [
            store.candidates("docs", query, k, where, text=text, mode=mode, shards=shards, generation=1)
            for shards in ([0, 2], [1], [3])
        ]
        assert combine(mode, parts, k) == whole
        assert len(whole) == k
