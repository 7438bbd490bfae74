"""``embedding.embed``: texts become vectors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from time import sleep
from typing import TYPE_CHECKING, Any

from celery import Celery

from cluster_tasks.errors import ProviderLimited
from cluster_tasks.tasks.arguments import CacheUse, EmbedArguments
from cluster_tasks.tasks.base import ClusterTask
from cluster_tasks.tasks.kept import kept_of
from cluster_tasks.tasks.ready_made import backends_of, ready_made

if TYPE_CHECKING:
    from cluster_tasks.providers import EmbeddingProvider, EmbeddingResult

EMBED = "embedding.embed"
BATCH = 64
"""Texts of one request: servers bound the size of a request, and some the number of its texts."""


def first_text(texts: str | Sequence[str], **_: Any) -> str:
    """The affinity of an embedding: its text, of several the first."""
    return texts if isinstance(texts, str) else texts[0]


def known_vectors(
    app: Celery, texts: list[str], model: str | None = None, cache: CacheUse = None
) -> dict[str, Any] | None:
    """Vectors that are all kept, from one model."""
    if cache in (False, "refresh") or (kept := kept_of(app)) is None:
        return None
    found = kept.find_vectors(texts, model)
    sources = {source[:2] for source in found.values()}
    if len(found) < len(set(texts)) or len(sources) != 1:
        return None
    ((by_model, provider),) = sources
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    vectors = [list(struct.unpack(f"<{len(found[text][2]) // 4}f", found[text][2])) for text in texts]
    return {"vectors": vectors, "model": by_model, "usage": usage, "provider": provider,
            "dimension": len(vectors[0]), "cached": True}  # fmt: skip


@ready_made(EMBED, request_type="embedding", affinity=first_text, arguments=EmbedArguments, known=known_vectors)
def embed(task: ClusterTask, texts: list[str], model: str | None = None, cache: CacheUse = None) -> dict[str, Any]:
    """Embed one text or a list of texts.

    Returns ``vectors`` (a list of rows, one for each text in their order; one row for a single text), ``dimension``,
    ``model``, ``usage``, ``provider`` and ``cached``. Fails, and is not retried, as ``llm.generate`` is.

    With ``cluster_cache_url`` vectors are kept, and only texts that are not known are embedded; ``usage`` is for those,
    and ``cached`` says that there were none. ``cache=False`` neither looks nor keeps, ``"refresh"`` embeds all anew.
    """
    result = embed_texts(task.app, texts, model, cache)
    return {**result.model_dump(mode="json"), "dimension": result.vectors.shape[1]}


def embed_texts(app: Celery, texts: Sequence[str], model: str | None = None, cache: CacheUse = None) -> EmbeddingResult:
    """Embed texts, at least one: those of which no vector is kept. Raises as ``EmbeddingProvider.embed`` does."""
    import numpy as np

    from cluster_tasks.providers import EmbeddingResult, Usage

    provider, kept = backends_of(app).embeddings, kept_of(app)
    if kept is None or cache is False:
        return embed_in_batches(provider, texts, model)
    found = {} if cache == "refresh" else kept.find_vectors(texts, model)
    if len({source[:2] for source in found.values()}) > 1:
        found = {}
    missing = [text for text in dict.fromkeys(texts) if text not in found]
    made = embed_in_batches(provider, missing, model) if missing else None
    if made is not None and any(source[:2] != (made.model, made.provider) for source in found.values()):
        # Vectors of two models cannot be mixed.
        found, missing = {}, list(dict.fromkeys(texts))
        made = embed_in_batches(provider, missing, model)
    vectors = {text: vector for text, (_, _, vector) in found.items()}
    if made is not None:
        new = {text: row.astype("<f4").tobytes() for text, row in zip(missing, made.vectors, strict=True)}
        kept.keep_vectors(new, model, made.model, made.provider)
        vectors |= new
    by_model, by_provider = (made.model, made.provider) if made is not None else next(iter(found.values()))[:2]
    rows = np.stack([np.frombuffer(vectors[text], dtype="<f4") for text in texts])
    return EmbeddingResult(
        vectors=rows,
        model=by_model,
        usage=made.usage if made is not None else Usage(),
        provider=by_provider,
        cached=made is None,
    )


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
