"""``embedding.embed``: texts become vectors."""

from __future__ import annotations

from collections.abc import Sequence
from time import sleep
from typing import TYPE_CHECKING, Any

from cluster_tasks.errors import ProviderLimited
from cluster_tasks.tasks.arguments import EmbedArguments
from cluster_tasks.tasks.base import ClusterTask
from cluster_tasks.tasks.ready_made import backends_of, ready_made

if TYPE_CHECKING:
    from cluster_tasks.providers import EmbeddingProvider, EmbeddingResult

EMBED = "embedding.embed"
BATCH = 64
"""Texts of one request: servers bound the size of a request, and some the number of its texts."""


def first_text(texts: str | Sequence[str], **_: Any) -> str:
    """The affinity of an embedding: its text, of several the first."""
    return texts if isinstance(texts, str) else texts[0]


@ready_made(EMBED, request_type="embedding", affinity=first_text, arguments=EmbedArguments)
def embed(task: ClusterTask, texts: list[str], model: str | None = None) -> dict[str, Any]:
    """Embed one text or a list of texts.

    Returns ``vectors`` (a list of rows, one for each text in their order; one row for a single text), ``dimension``,
    ``model``, ``usage`` and ``provider``. Fails, and is not retried, as ``llm.generate`` is.
    """
    result = embed_in_batches(backends_of(task.app).embeddings, texts, model)
    return {**result.model_dump(mode="json"), "dimension": result.vectors.shape[1]}


def embed_in_batches(provider: EmbeddingProvider, texts: Sequence[str], model: str | None = None) -> EmbeddingResult:
    """Embed texts, at least one, in as many requests as it takes. Raises as ``EmbeddingProvider.embed`` does."""
    import numpy as np

    from cluster_tasks.providers import EmbeddingRequest, EmbeddingResult, Usage

    results: list[EmbeddingResult] = []
    while len(results) * BATCH < len(texts):
        start = len(results) * BATCH
        try:
            results.append(provider.embed(EmbeddingRequest(texts=tuple(texts[start : start + BATCH]), model=model)))
        except ProviderLimited as exc:
            # A job that comes back later begins anew: one of many requests might never get through.
            if not results:
                raise
            sleep(exc.retry_after_s)
    return EmbeddingResult(
        vectors=np.concatenate([result.vectors for result in results]),
        model=results[0].model,
        usage=Usage(**{name: sum(getattr(result.usage, name) for result in results) for name in Usage.model_fields}),
        provider=results[0].provider,
    )
