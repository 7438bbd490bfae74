"""Rankings put together, without a database."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.shards.documents import Candidates, Mode, Passage
from cluster_tasks.shards.fusion import LEAST_DEPTH, RRF_K, combine, depth, fuse, in_order, merge, rank

MODES: list[Mode] = ["vector", "text", "hybrid"]


@dataclass(frozen=True)
class Found:
    id: str
    score: float


def ranking(ids: str) -> list[Found]:
    return [Found(name, -float(place)) for place, name in enumerate(ids)]


def test_the_best_of_both_rankings_come_before_the_first_of_one() -> None:
    fused = fuse([ranking("abcd"), ranking("xbyc")], 3)
    assert [found.id for _, found in fused] == ["b", "c", "a"]
    assert fused[0][0] == pytest.approx(1 / (RRF_K + 2) + 1 / (RRF_K + 2))
    assert fused[1][0] == pytest.approx(1 / (RRF_K + 3) + 1 / (RRF_K + 4))
    assert fused[2][0] == pytest.approx(1 / (RRF_K + 1))


def test_equals_come_in_the_order_of_their_ids() -> None:
    assert [found.id for _, found in fuse([ranking("ab"), ranking("ba")], 2)] == ["a", "b"]
    assert [found.id for found in merge([[Found("c", 1), Found("b", 1)], [Found("a", 1)]], 2)] == ["a", "b"]


def test_a_ranking_that_found_nothing_changes_no_order() -> None:
    assert [found.id for _, found in fuse([ranking("bac"), []], 9)] == ["b", "a", "c"]
    assert fuse([[], []], 9) == []


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
    assert [(each.id, each.score) for each in combine("hybrid", found, 5)] == [("cat", 1 / 61), ("hen", 1 / 61)]
