"""Rankings put together: those of several shards into one, and those of several kinds of search into one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from cluster_tasks.shards.documents import Candidates, Mode, Passage

VECTOR_SHARE = 0.6
"""How much the vectors count in a fused score; words have the rest. Chosen with ``benchmarks.relevance`` on half of its
queries, where all from 0.3 to 0.8 are nearly as good."""
LEAST_COSINE, LEAST_BM25 = -1.0, 0.0
LEAST_DEPTH = 10
"""Both rankings are read so far at least, for what is high in both to be found. Further down they agree by chance."""


class Ranked(Protocol):
    """What was found: higher scores come first, of equals the least id."""

    @property
    def score(self) -> float:
        """How well it fits; higher is better."""

    @property
    def id(self) -> str:
        """Of the document."""


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


def fuse(nearest: Sequence[R], matching: Sequence[R], k: int, enough: int) -> list[tuple[float, R]]:
    """Return the ``k`` best of both rankings, each with its fused score, best first; of equals the least id.

    ``nearest`` have cosine similarities and ``matching`` BM25, each cut at ``enough``. A score counts as its part of
    the best in its ranking, from the least that there can be: 1 for the best. The fused score, 0 to 1, is the mean of
    both, weighted by VECTOR_SHARE: the convex combination with theoretical minima of Bruch, Gai and Ingber, "An
    Analysis of Fusion Functions for Hybrid Retrieval", ACM TOIS 42(1), 2023.

    What a ranking lacks counts as its last: that it is behind is all that is known. In one that was not cut it has the
    least score.
    """
    near, far = _parts(nearest, LEAST_COSINE, enough)
    apt, inapt = _parts(matching, LEAST_BM25, enough)
    found = {each.id: each for each in [*matching, *nearest]}
    scores = {name: VECTOR_SHARE * near.get(name, far) + (1 - VECTOR_SHARE) * apt.get(name, inapt) for name in found}
    best = sorted(scores, key=lambda name: (-scores[name], name))[:k]
    return [(scores[name], found[name]) for name in best]


def _parts(ranking: Sequence[R], least: float, enough: int) -> tuple[dict[str, float], float]:
    """Return what each of a ranking has of its best score, and what others have."""
    best = ranking[0].score - least if ranking else 0.0
    if not best:
        return {}, 0.0
    parts = {each.id: (each.score - least) / best for each in ranking}
    return parts, parts[ranking[-1].id] if len(ranking) >= enough else 0.0


def depth(mode: Mode, k: int) -> int:
    """Return how many of each ranking are needed for the best ``k``."""
    return max(k, LEAST_DEPTH) if mode == "hybrid" else k


def rank(mode: Mode, nearest: Iterable[Sequence[R]], matching: Iterable[Sequence[R]], k: int) -> list[tuple[float, R]]:
    """Return the ``k`` best of what shards, or nodes, have found, each with its score; best first.

    ``nearest`` are rankings by the vector and ``matching`` by the text, each ``depth`` long if there was so much.
    """
    enough = depth(mode, k)
    if mode == "hybrid":
        return fuse(merge(nearest, enough), merge(matching, enough), k, enough)
    return [(each.score, each) for each in merge(nearest if mode == "vector" else matching, k)]


def combine(mode: Mode, found: Sequence[Candidates], k: int) -> list[Passage]:
    """Return the ``k`` best documents of what several nodes have found, best first."""
    ranked = rank(mode, [each.nearest for each in found], [each.matching for each in found], k)
    return [passage.model_copy(update={"score": score}) for score, passage in ranked]
