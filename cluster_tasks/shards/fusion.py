"""Rankings put together: those of several shards into one, and those of several kinds of search into one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from cluster_tasks.shards.documents import Candidates, Mode, Passage

RRF_K = 60
"""How little the first ranks count more than the next; the constant of Cormack, Clarke and Buettcher, "Reciprocal Rank
Fusion outperforms Condorcet and individual Rank Learning Methods", SIGIR 2009."""
LEAST_DEPTH = 10
"""Both rankings are read so far at least, for what is high in both to be found. Further down they agree by chance."""


class Ranked(Protocol):
    """What was found: higher scores come first, of equals the least id."""

    @property
    def score(self) -> float: ...

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Ranked)


def in_order(found: Iterable[R]) -> list[R]:
    """Return what was found, the best first."""
    return sorted(found, key=lambda each: (-each.score, each.id))


def is_settled(found: Sequence[Ranked], limit: int, k: int) -> bool:
    """Whether the first ``k`` of ``found``, the best first, are the best of a search that stopped at ``limit``.

    If not, others as good as the k-th may lie beyond, in whatever order the engine has: the limit is to be widened.
    """
    return len(found) < limit or found[-1].score < found[k - 1].score


def merge(rankings: Iterable[Iterable[R]], k: int) -> list[R]:
    """Return the ``k`` best of rankings whose scores mean the same, as of several shards."""
    return in_order(each for ranking in rankings for each in ranking)[:k]


def fuse(rankings: Sequence[Sequence[R]], k: int) -> list[tuple[float, R]]:
    """Return the ``k`` best of rankings whose scores cannot be compared, each with its fused score, best first.

    The score of a document is the sum of 1 / (RRF_K + rank) over the rankings that have it, ranks from 1: of two
    rankings at most 2 / 61. Of equals the least id comes first.
    """
    scores: dict[str, float] = {}
    found: dict[str, R] = {}
    for ranking in rankings:
        for rank, each in enumerate(ranking, start=1):
            scores[each.id] = scores.get(each.id, 0.0) + 1 / (RRF_K + rank)
            found.setdefault(each.id, each)
    best = sorted(scores, key=lambda name: (-scores[name], name))[:k]
    return [(scores[name], found[name]) for name in best]


def depth(mode: Mode, k: int) -> int:
    """Return how many of each ranking are needed for the best ``k``."""
    return max(k, LEAST_DEPTH) if mode == "hybrid" else k


def rank(mode: Mode, nearest: Iterable[Sequence[R]], matching: Iterable[Sequence[R]], k: int) -> list[tuple[float, R]]:
    """Return the ``k`` best of what shards, or nodes, have found, each with its score; best first.

    ``nearest`` are rankings by the vector and ``matching`` by the text, each ``depth`` long if there was so much.
    """
    enough = depth(mode, k)
    if mode == "hybrid":
        return fuse([merge(nearest, enough), merge(matching, enough)], k)
    return [(each.score, each) for each in merge(nearest if mode == "vector" else matching, k)]


def combine(mode: Mode, found: Sequence[Candidates], k: int) -> list[Passage]:
    """Return the ``k`` best documents of what several nodes have found, best first."""
    ranked = rank(mode, [each.nearest for each in found], [each.matching for each in found], k)
    return [passage.model_copy(update={"score": score}) for score, passage in ranked]
