"""Rankings by models behind a URL that takes ``POST …/rerank`` as Jina and Cohere do, and vLLM, llama.cpp and others.

Sent: ``model``, ``query``, ``documents`` (texts) and ``top_n``. Expected: ``results``, each with ``index`` and
``relevance_score``. The client is that of the OpenAI SDK, which knows no rankings, for it repeats and authorizes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from cluster_tasks.providers.base import Rank, RerankRequest, RerankResult, Usage
from cluster_tasks.providers.openai import Connection, Endpoint, excerpt


class _Result(BaseModel):
    model_config = ConfigDict(strict=True)

    index: NonNegativeInt
    relevance_score: FiniteFloat


class _Reply(BaseModel):
    results: list[_Result]
    model: str | None = None
    usage: Any = None


class HttpReranker:
    """Reranking models behind a URL."""

    name = "rerank"

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._connection = Connection(endpoint)

    def rerank(self, request: RerankRequest) -> RerankResult:
        """Rank all texts in one request. Raises as ``ChatProvider.chat`` does."""
        model, top = self.endpoint.model_for(request.model), min(request.top, len(request.texts))
        body = {"model": model, "query": request.query, "documents": list(request.texts), "top_n": top}
        with self._connection.errors_mapped():
            reply = self._connection.client.post(
                "/rerank", cast_to=object, body=body, options={"headers": self._connection.headers()}
            )
        try:
            read = _Reply.model_validate(reply)
            ranking = _ranking(read.results, len(request.texts), top)
        except ValueError as exc:
            reason = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else exc
            raise self._connection.error(f"the reply is no ranking: {reason}: {excerpt(reply)}") from None
        return RerankResult(ranking=ranking, model=read.model or model, usage=_usage(read.usage), provider=self.name)

    def close(self) -> None:
        """Close this process's connections. Safe to repeat."""
        self._connection.close()


def _ranking(results: list[_Result], texts: int, top: int) -> list[Rank]:
    """The ``top`` best of so many ``texts``, of equals the one that the search put first. Raises ValueError."""
    indexes = {result.index for result in results}
    if len(indexes) < len(results) or max(indexes, default=0) >= texts:
        raise ValueError(f"its indexes are not those of {texts} texts")
    if len(results) < top:
        raise ValueError(f"{top} texts were wanted, {len(results)} came")
    ordered = sorted(results, key=lambda result: (-result.relevance_score, result.index))
    return [Rank(index=result.index, score=result.relevance_score) for result in ordered[:top]]


def _usage(said: Any) -> Usage:
    # Cohere counts searches and no tokens.
    counts = said if isinstance(said, Mapping) else {}
    return Usage(**{name: counts[name] for name in Usage.model_fields if isinstance(counts.get(name), int)})
