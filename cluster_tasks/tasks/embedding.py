"""``embedding.embed``: texts become vectors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate, chain, islice, pairwise
from time import sleep
from typing import TYPE_CHECKING, Any

from celery import Celery

from cluster_tasks.errors import ProviderLimited, ProviderUnavailable
from cluster_tasks.tasks.arguments import CacheUse, EmbedArguments
from cluster_tasks.tasks.base import ClusterTask
from cluster_tasks.tasks.kept import Embedded, kept_of
from cluster_tasks.tasks.ready_made import backends_of, ready_made

if TYPE_CHECKING:
    from cluster_tasks.providers import EmbeddingProvider, EmbeddingResult, Usage

EMBED = "embedding.embed"
BATCH = 64
"""Texts of one request: servers bound the size of a request, and some the number of its texts."""


MODEL_CHANGES = 3
"""So often the texts of a job are embedded anew, because another model answered."""


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
    sources = {(one.model, one.provider) for one in found.values()}
    if len(found) < len(set(texts)) or len(sources) != 1:
        return None
    ((by_model, provider),) = sources
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    vectors = [list(struct.unpack(f"<{len(found[text].vector) // 4}f", found[text].vector)) for text in texts]
    return {"vectors": vectors, "model": by_model, "usage": usage, "provider": provider,
            "dimension": len(vectors[0]), "cached": True}  # fmt: skip


def embed_together(app: Celery, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Do several jobs of ``embed``, whose arguments are ``calls``: those for one model embed their texts together.

    The ``usage`` of each is its share by the words of its texts. Raises as ``embed_texts`` does, but for what all of
    them would meet alone, which is returned for each.
    """
    done: list[Any] = [None] * len(calls)
    places: dict[tuple[str | None, CacheUse], list[int]] = {}
    for place, call in enumerate(calls):
        places.setdefault((call.get("model"), call.get("cache")), []).append(place)
    for (model, cache), alike in places.items():
        texts = [calls[place]["texts"] for place in alike]
        try:
            results: Iterable[Any] = _shares(*_embed(app, list(chain(*texts)), model, cache), texts)
        except ProviderLimited:
            # Alone each comes back when there is room.
            raise
        except ProviderUnavailable as exc:
            results = [exc] * len(alike)
        for place, result in zip(alike, results, strict=True):
            done[place] = result
    return done


def _shares(result: EmbeddingResult, made: Set[str], texts: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """What each of several jobs gets of what was embedded for all; ``made`` are the texts that were not known."""
    rows, words = (
        iter(result.vectors.tolist()),
        [sum(len(text.split()) for text in own if text in made) for own in texts],
    )
    total, dimension = result.usage.model_dump(), result.vectors.shape[1]
    usages = zip(*(_apportioned(count, words) for count in total.values()), strict=True)
    for own, usage in zip(texts, usages, strict=True):
        yield {
            "vectors": list(islice(rows, len(own))), "model": result.model,
            "usage": dict(zip(total, usage, strict=True)),
            "provider": result.provider, "cached": made.isdisjoint(own), "dimension": dimension,
        }  # fmt: skip


def _apportioned(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in about this ratio, whose sum is ``total``."""
    whole = sum(weights) or 1
    bounds = [total * reached // whole for reached in accumulate(weights)]
    return [bound - before for before, bound in pairwise([0, *bounds[:-1], total])]


@ready_made(
    EMBED, request_type="embedding", affinity=first_text, arguments=EmbedArguments, known=known_vectors,
    together=embed_together, batch=BATCH,
)  # fmt: skip
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
    return _embed(app, texts, model, cache)[0]


def _embed(app: Celery, texts: Sequence[str], model: str | None, cache: CacheUse) -> tuple[EmbeddingResult, Set[str]]:
    """The same, and the texts that were embedded for it."""
    import numpy as np

    from cluster_tasks.providers import EmbeddingResult

    provider, kept = backends_of(app).embeddings, kept_of(app)
    if kept is None or cache is False:
        return embed_in_batches(provider, texts, model), set(texts)
    made: list[EmbeddingResult] = []
    new: set[str] = set()

    def embed_now(some: list[str]) -> dict[str, Embedded]:
        result = embed_in_batches(provider, some, model, begun=bool(made))
        made.append(result)
        new.update(some)
        rows = result.vectors.astype("<f4")
        return {
            text: Embedded(result.model, result.provider, row.tobytes()) for text, row in zip(some, rows, strict=True)
        }

    def embed_anew() -> dict[str, Embedded]:
        vectors = embed_now(different)
        kept.keep_vectors(vectors, model)
        return vectors

    different = list(dict.fromkeys(texts))
    vectors: dict[str, Embedded] = {}
    if cache == "refresh":
        vectors = embed_anew()
    else:
        # Some at a time: who waits for one text of many does not wait for all.
        for start in range(0, len(different), BATCH):
            vectors |= kept.vectors(different[start : start + BATCH], model, embed_now)
        if len({(one.model, one.provider) for one in vectors.values()}) > 1:
            # Vectors of two models cannot be mixed.
            vectors = embed_anew()
    by_model, by_provider, _ = vectors[texts[0]]
    rows = np.stack([np.frombuffer(vectors[text].vector, dtype="<f4") for text in texts])
    usage = _sum(result.usage for result in made)
    return EmbeddingResult(vectors=rows, model=by_model, usage=usage, provider=by_provider, cached=not made), new


def embed_in_batches(
    provider: EmbeddingProvider, texts: Sequence[str], model: str | None = None, *, begun: bool = False
) -> EmbeddingResult:
    """Embed texts, at least one, in as many requests as it takes. Raises as ``EmbeddingProvider.embed`` does.

    All by one model: if another answers midway, as when a provider fails and the next one takes over, all is embedded
    anew; ProviderUnavailable if that does not last either. ``begun``: something was embedded for the same job before,
    so that it waits where there is no room under a limit.
    """
    import numpy as np

    from cluster_tasks.providers import EmbeddingRequest, EmbeddingResult

    results: list[EmbeddingResult] = []
    usages: list[Usage] = []
    changes = 0
    while len(results) * BATCH < len(texts):
        start = len(results) * BATCH
        try:
            result = provider.embed(EmbeddingRequest(texts=tuple(texts[start : start + BATCH]), model=model))
            usages.append(result.usage)
            if results and _source(result) != _source(results[0]):
                if (changes := changes + 1) > MODEL_CHANGES:
                    both = f"{_source(results[0])}, then by {_source(result)}"
                    raise ProviderUnavailable(f"texts of one job were embedded by {both}: they cannot be mixed")
                results = []
                continue
            results.append(result)
        except ProviderLimited as exc:
            # A job that comes back later begins anew: one of many requests might never get through.
            if not (begun or usages):
                raise
            sleep(exc.retry_after_s)
    return EmbeddingResult(
        vectors=np.concatenate([result.vectors for result in results]),
        model=results[0].model,
        usage=_sum(usages),
        provider=results[0].provider,
    )


def _source(result: EmbeddingResult) -> str:
    return f"{result.model!r} of {result.provider} in {result.vectors.shape[1]} dimensions"


def _sum(usages: Iterable[Usage]) -> Usage:
    from cluster_tasks.providers import Usage

    listed = list(usages)
    return Usage(**{name: sum(getattr(usage, name) for usage in listed) for name in Usage.model_fields})
