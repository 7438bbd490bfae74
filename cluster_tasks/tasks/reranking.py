"""A search finds more passages than are wanted, and a model, or what stands in for it, chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from celery import Celery

from cluster_tasks.tasks.arguments import MAX_CANDIDATES
from cluster_tasks.tasks.ready_made import backends_of

LEAST_CANDIDATES, CANDIDATES_FOR_ONE = 25, 5
"""So many passages are ranked anew, if nobody says: at least, and for each that is wanted."""


class Reranking(TypedDict):
    """How what was found is ranked anew."""

    model: str | None
    """None: that of the settings."""
    candidates: int
    """So many passages are searched for."""
    allow_degraded: bool


def reranking_of(rerank: bool | str | None, candidates: int | None, k: int, allow_degraded: bool) -> Reranking | None:
    """Return how what is found is ranked anew, of what a caller said; None: it is not."""
    if not rerank:
        return None
    usual = min(max(LEAST_CANDIDATES, CANDIDATES_FOR_ONE * k), MAX_CANDIDATES)
    return Reranking(
        model=rerank if isinstance(rerank, str) else None, candidates=candidates or usual, allow_degraded=allow_degraded
    )


def reranked(
    app: Celery, found: dict[str, Any], text: str | None, k: int, reranking: Reranking | None
) -> dict[str, Any]:
    """Return what was found with the ``k`` passages that fit ``text`` best, and ``rerank``, which says who chose them.

    Raises as ``RerankGateway.rerank`` does.
    """
    if reranking is None:
        return found
    passages: list[dict[str, Any]] = found["passages"]
    if not passages:
        return {**found, "rerank": {"provider": "", "model": "", "degraded": False, "degraded_reason": ""}}
    from cluster_tasks.providers import RerankRequest

    request = RerankRequest(
        query=text or "",
        texts=tuple(passage["text"] for passage in passages),
        scores=tuple(passage["score"] for passage in passages),
        top=k,
        model=reranking["model"],
    )
    result = backends_of(app).reranker.rerank(request, reranking["allow_degraded"])
    chosen = [{**passages[rank.index], "rerank_score": rank.score} for rank in result.ranking]
    by = result.model_dump(mode="json", include={"provider", "model", "degraded", "degraded_reason"})
    return {**found, "passages": chosen, "rerank": by}


def is_degraded(found: Mapping[str, Any]) -> bool:
    """Whether a model was to rank what was found, and another, or none, did."""
    return bool(found.get("rerank", {}).get("degraded"))
