"""Rankings put together, without a database."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.shards.documents import Candidates, Mode, Passage
from cluster_tasks.shards.fusion import LEAST_DEPTH, VECTOR_SHARE, combine, depth, fuse, in_order, merge, rank

MODES: list[Mode] = ["vector", "text", "hybrid"]


@dataclass(frozen=True)
class Found:
    id: str
    score: float


def ranking(**scores: float) -> list[Found]:
    return [Found(name, score) for name, score in scores.items()]


def ids(fused: list[tuple[float, Found]]) -> list[str]:
    return [found.id for _, found in fused]


def test_a_score_counts_as_its_part_of_the_best_from_the_least_there_can_be() -> None:
    fused = fuse(ranking(a=0.5, b=0.2, c=-1.0), ranking(c=8.0, b=6.0), 9, enough=9)
    words = 1 - VECTOR_SHARE
    assert {found.id: score for score, found in fused} == pytest.approx(
        {"a": VECTOR_SHARE, "b": VECTOR_SHARE * 1.2 / 1.5 + words * 6 / 8, "c": words}
    )
    assert ids(fused) == ["b", "a", "c"]


def test_what_lies_beyond_the_end_of_a_ranking_counts_as_its_last() -> None:
    cut = fuse(ranking(a=0.8, b=0.6), ranking(c=8.0, a=6.0), 9, enough=2)
    words = 1 - VECTOR_SHARE
    assert {found.id: score for score, found in cut} == pytest.approx(
        {
            "a": VECTOR_SHARE + words * 6 / 8,
            "b": VECTOR_SHARE * 1.6 / 1.8 + words * 6 / 8,
            "c": VECTOR_SHARE * 1.6 / 1.8 + words,
        }
    )


def test_equals_come_in_the_order_of_their_ids() -> None:
    assert ids(fuse(ranking(b=1, a=1), ranking(a=2, b=2), 2, enough=9)) == ["a", "b"]
    assert [found.id for found in merge([[Found("c", 1), Found("b", 1)], [Found("a", 1)]], 2)] == ["a", "b"]


def test_a_ranking_that_found_nothing_changes_no_order() -> None:
    assert ids(fuse(ranking(b=0.9, a=0.2, c=-0.3), [], 9, enough=9)) == ["b", "a", "c"]
    assert ids(fuse([], ranking(b=9.0, a=2.0, c=0.1), 9, enough=9)) == ["b", "a", "c"]
    assert ids(fuse(ranking(b=-1.0), [], 9, enough=9)) == ["b"]
    assert fuse([], [], 9, enough=9) == []


cosines = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-1, 1, width=16))
weights = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.125, 40, width=16))


@given(cosines, weights, st.integers(1, 10))
def test_no_score_is_beyond_one_and_who_is_better_by_both_comes_first(
    near: dict[str, float], apt: dict[str, float], enough: int
) -> None:
    nearest, matching = (in_order(ranking(**scores))[:enough] for scores in (near, apt))
    fused = {found.id: score for score, found in fuse(nearest, matching, 99, enough)}
    assert fused.keys() == {found.id for found in [*nearest, *matching]}
    assert all(0 <= score <= 1 for score in fused.values())
    listed = {found.id for found in nearest} & {found.id for found in matching}
    for better in listed:
        for worse in listed:
            if near[better] >= near[worse] and apt[better] >= apt[worse]:
                assert fused[better] >= fused[worse]
    if nearest and matching and nearest[0].id == matching[0].id and nearest[0].score > -1:
        assert fused[nearest[0].id] == pytest.approx(1)


def test_both_rankings_are_read_as_far_as_it_takes() -> None:
    assert [depth(mode, 1) for mode in MODES] == [1, 1, LEAST_DEPTH]
    assert [depth(mode, 1000) for mode in MODES] == [1000, 1000, 1000]


scores = st.floats(0, 1, width=16)
documents = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.tuples(scores, scores, st.integers(0, 3)))


@given(documents, st.integers(1, 12), st.sampled_from(MODES))
def test_what_shards_found_is_put_together_as_if_there_were_one(
    stored: dict[str, tuple[float, float, int]], k: int, mode: Mode
) -> None:
    def found(by: int, shard: int | None) -> list[Found]:
        all_of = [Found(name, each[by]) for name, each in stored.items() if shard in (None, each[2])]
        return in_order(all_of)[: depth(mode, k)]

    apart = rank(mode, [found(0, shard) for shard in range(4)], [found(1, shard) for shard in range(4)], k)
    assert apart == rank(mode, [found(0, None)], [found(1, None)], k)
    assert len(apart) == min(k, len(stored))


def test_passages_of_nodes_get_the_score_of_their_mode() -> None:
    cat, hen = (Passage(id=name, text=name, metadata={}, score=0.5) for name in ("cat", "hen"))
    found = [Candidates(nearest=[cat], matching=[]), Candidates(nearest=[], matching=[hen])]
    assert combine("vector", found, 5) == [cat]
    assert combine("text", found, 5) == [hen]
    assert [(each.id, each.score) for each in combine("hybrid", found, 5)] == [
        ("cat", VECTOR_SHARE),
        ("hen", pytest.approx(1 - VECTOR_SHARE)),
    ]
