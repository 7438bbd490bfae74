"""How well the modes of search find what was meant: ``python -m benchmarks.relevance [--full] [--json]``.

Docstrings of the standard library are asked for by their summaries and by the names of their functions, see
``benchmarks.docstrings``, with each of the local embeddings. The measure is nDCG@10, 0 to 1, the mean over the queries:
1 if all that is right comes first (Järvelin and Kekäläinen, "Cumulated Gain-based Evaluation of IR Techniques", ACM
TOIS 20(4), 2002). The share of the vectors in hybrid search was chosen on half of the queries; the mark is for the
others. Mark: with ``local-static``, hybrid beats both vectors and words alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import get_args

from benchmarks.docstrings import Docstrings, Query, load
from benchmarks.report import Benchmark, Mark, Row
from cluster_tasks.providers import EmbeddingProvider, EmbeddingRequest, embedding_provider
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.shards.documents import Document, Mode
from cluster_tasks.shards.store import CollectionStore

K, BATCH = 10, 64
MODELS, MARKED = ("local-hash", "local-static"), "local-static"
MODES: tuple[Mode, ...] = get_args(Mode)
CHOSEN, SHOWN = "all, chosen on", "all, the others"
GROUPS: dict[str, Callable[[Query], bool]] = {
    "summaries": lambda query: query.kind == "summary",
    "names": lambda query: query.kind == "name",
    CHOSEN: lambda query: query.half == 0,
    SHOWN: lambda query: query.half == 1,
}
Gains = dict[Mode, float]


def ndcg(found: Sequence[str], relevant: frozenset[str]) -> float:
    """Return the nDCG@10 of a ranking."""
    gained = sum(1 / math.log2(place + 2) for place, each in enumerate(found[:K]) if each in relevant)
    return gained / sum(1 / math.log2(place + 2) for place in range(min(K, len(relevant))))


def measure(data: Docstrings, queries: Iterable[Query], provider: EmbeddingProvider) -> list[tuple[Query, Gains]]:
    """Return what each mode gains for each query."""
    with tempfile.TemporaryDirectory() as folder:
        store = CollectionStore(folder)
        documents = [Document(id=name, text=text) for name, text in data.passages.items()]
        for start in range(0, len(documents), BATCH):
            some = documents[start : start + BATCH]
            embedded = provider.embed(EmbeddingRequest(texts=tuple(document.text for document in some)))
            store.upsert("docstrings", some, embedded.vectors, embedded.model)
        store.optimize("docstrings")

        def gains(query: Query) -> Gains:
            vector = provider.embed(EmbeddingRequest(texts=(query.text,))).vectors[0]
            given = {"vector": {"vector": vector}, "text": {"text": query.text}}
            given["hybrid"] = given["vector"] | given["text"]
            found = {mode: store.search("docstrings", k=K, mode=mode, **given[mode]) for mode in MODES}
            return {mode: ndcg([passage.id for passage in found[mode]], query.relevant) for mode in MODES}

        return [(query, gains(query)) for query in queries]


def means(measured: Sequence[tuple[Query, Gains]], belongs: Callable[[Query], bool] = lambda query: True) -> Gains:
    """Return the mean gain of each mode over the queries that belong."""
    return {mode: fmean(gains[mode] for query, gains in measured if belongs(query)) for mode in MODES}


def beats_both(gains: Gains) -> bool:
    """Whether hybrid search found better than either of its parts."""
    return gains["hybrid"] > max(gains["vector"], gains["text"])


def found(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each model and group of queries; the ratio is hybrid search to the better of its parts."""
    data = load()
    queries = data.queries[:: options.every]
    for model in MODELS:
        measured = measure(data, queries, embedding_provider(ClusterSettings(embedding_model=model)))
        for group, belongs in GROUPS.items():
            gains = means(measured, belongs)
            yield Row(
                f"{model}, {group}",
                {f"{mode}, nDCG@{K}": gain for mode, gain in gains.items()},
                ratio=gains["hybrid"] / max(gains["vector"], gains["text"]),
                mark=Mark(above=1.0) if (model, group) == (MARKED, SHOWN) else None,
            )


def main() -> int:
    benchmark = Benchmark("relevance", __doc__)
    benchmark.option("--every", short=20, full=1, help="ask every N-th query only")
    return benchmark.run(found)


if __name__ == "__main__":
    sys.exit(main())
