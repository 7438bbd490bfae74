"""Search by words, and by words and vectors together, whatever engine does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster_tasks.errors import CollectionMismatch, InvalidArguments
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.fusion import VECTOR_SHARE
from cluster_tasks.shards.vector_store import VectorStore

MODEL = "model-a"
TEXTS = {
    "blue": "The sky is blue because air scatters blue light.",
    "cat": "A cat sleeps for most of the day.",
    "hens": "Hens lay three hundred eggs a year; one hen lays an egg a day.",
    "cafe": "In the CAFÉ they play number 7 of get_user_name.",
}
DIRECTIONS = {"blue": [1.0, 0.0], "cat": [0.8, 0.6], "hens": [0.0, 1.0], "cafe": [-1.0, 0.0]}


@pytest.fixture
def filled(store: VectorStore) -> VectorStore:
    add(store, TEXTS)
    return store


def add(store: VectorStore, texts: dict[str, str]) -> None:
    documents = [Document(id=name, text=text, metadata={"length": len(text)}) for name, text in texts.items()]
    vectors = np.array([DIRECTIONS.get(name, [0.0, -1.0]) for name in texts])
    store.upsert("docs", documents, vectors, MODEL)


def found(store: VectorStore, text: str, k: int = 10, where: dict[str, Any] | None = None) -> list[str]:
    return [passage.id for passage in store.search("docs", text=text, k=k, where=where)]


# Words.


def test_words_are_found_in_any_form_case_and_accent(filled: VectorStore) -> None:
    assert found(filled, "SKY") == ["blue"]
    assert found(filled, "sleeping cats") == ["cat"]
    assert found(filled, "cafe") == found(filled, "café") == ["cafe"]
    assert found(filled, "number 7") == ["cafe"]
    assert found(filled, "elephant") == []
    assert found(filled, "the of and") == []


def test_who_has_more_of_the_words_comes_first_with_a_higher_score(filled: VectorStore) -> None:
    passages = filled.search("docs", text="the day a hen lays eggs", k=10)
    assert [passage.id for passage in passages] == ["hens", "cat"]
    assert passages[0].score > passages[1].score > 0
    assert passages[0].text == TEXTS["hens"]
    assert found(filled, "the day a hen lays eggs", k=1) == ["hens"]


def test_rows_are_found_before_and_after_the_index_knows_them(filled: VectorStore) -> None:
    filled.optimize("docs")
    assert found(filled, "blue") == ["blue"]
    add(filled, {"dog": "A dog in a blue coat.", "cat": "A lion."})
    for _ in range(2):
        assert sorted(found(filled, "blue")) == ["blue", "dog"]
        assert found(filled, "lion") == ["cat"]
        assert found(filled, "sleeps") == [], "the text of before is not found any more"
        filled.optimize("docs")
    filled.delete("docs", ids=["blue"])
    assert found(filled, "blue") == ["dog"]


def test_a_filter_chooses_before_the_words_do(filled: VectorStore) -> None:
    add(filled, {f"{n:02}": f"blue {'x ' * n}" for n in range(20)})
    assert set(found(filled, "blue", k=3, where={"length": {"gte": 39, "lte": 43}})) == {"17", "18", "19"}
    assert found(filled, "blue", where={"length": 5.0}) == ["00"]


def test_equally_good_texts_come_in_the_order_of_their_ids(filled: VectorStore) -> None:
    add(filled, {f"{n:03}": "one and the same zebra" for n in np.random.default_rng(3).permutation(100)})
    filled.optimize("docs")
    passages = filled.search("docs", text="zebra", k=100)
    assert passages == sorted(passages, key=lambda passage: (-passage.score, passage.id))
    assert found(filled, "zebra", k=5) == [passage.id for passage in passages[:5]]
    if len({passage.score for passage in passages}) == 1:  # Shards count words each for itself.
        assert found(filled, "zebra", k=5) == ["000", "001", "002", "003", "004"]
    assert found(filled, "zebra", k=100, where={"length": 22}) == found(filled, "zebra", k=100)


HOSTILE = [
    '"sky" AND (NOT blue OR', "text:sky*", "sky~2 +blue -air", "sky' OR ''='", '{"match": {"terms": "sky"}}', "sky\\",
    "sky \0", "(((((sky", "sky^9999999999", "[sky TO *]", "sky && || !",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_signs_in_a_query_mean_nothing(filled: VectorStore, text: str) -> None:
    assert "blue" in found(filled, text)
    assert [passage.id for passage in filled.search("docs", np.array([1.0, 0.0]), 1, text=text)] == ["blue"]


@pytest.mark.parametrize("text", ["'", "\0", "   ", "*", "\\", "a" * 100_000, "的天空", "😀", "\u2028"])
def test_a_query_without_a_word_that_is_known_finds_nothing(filled: VectorStore, text: str) -> None:
    assert found(filled, text) == []
    assert len(filled.search("docs", np.array([1.0, 0.0]), 9, text=text)) == len(TEXTS)


def test_a_long_question_is_searched_for_with_all_its_words(filled: VectorStore) -> None:
    assert found(filled, " ".join(f"word{n}" for n in range(5_000)) + " sky") == ["blue"]


# Both.


def test_hybrid_finds_by_both_and_scores_by_both(filled: VectorStore) -> None:
    vector, text = np.array([1.0, 0.1]), "hens eat a cat"
    passages = filled.search("docs", vector, 10, text=text)
    assert passages[0].id == "cat", "good by both"
    assert sorted(passage.id for passage in passages) == sorted(TEXTS)
    near = {passage.id: passage.score for passage in filled.search("docs", vector, 10)}
    apt = {passage.id: passage.score for passage in filled.search("docs", text=text, k=10)}
    for passage in passages:
        by_vector = (1 + near[passage.id]) / (1 + near["blue"])
        by_words = apt.get(passage.id, 0) / max(apt.values())
        assert passage.score == pytest.approx(VECTOR_SHARE * by_vector + (1 - VECTOR_SHARE) * by_words)


def test_the_mode_follows_from_what_is_given_or_is_said(filled: VectorStore) -> None:
    vector, text = np.array([1.0, 0.0]), "hens"
    assert filled.search("docs", vector, 2)[0].score == pytest.approx(1)
    assert filled.search("docs", vector, 2, text=text, mode="vector") == filled.search("docs", vector, 2)
    assert filled.search("docs", vector, 2, text=text, mode="text") == filled.search("docs", k=2, text=text)
    assert filled.search("docs", vector, 2, text=text) == filled.search("docs", vector, 2, text=text, mode="hybrid")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "text"), ({"text": ""}, "text"), ({"mode": "vector", "text": "a"}, "vector"),
        ({"mode": "hybrid", "text": "a"}, "vector"), ({"mode": "hybrid", "vector": np.ones(2)}, "text"),
        ({"mode": "text", "vector": np.ones(2)}, "text"), ({"mode": "words", "text": "a"}, "unknown mode"),
        ({"text": "\ud800"}, "text"),
    ],
)  # fmt: skip
def test_a_mode_without_what_it_needs_is_refused(filled: VectorStore, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArguments, match=problem):
        filled.search("docs", **given)


def test_another_model_is_refused_unless_no_vector_is_compared(filled: VectorStore) -> None:
    with pytest.raises(CollectionMismatch):
        filled.search("docs", np.ones(2), text="sky", embedding_model="model-b")
    assert filled.search("docs", text="sky", embedding_model="model-b")
