"""How quickly collections are searched, and how well: ``python -m benchmarks.retrieval [--full] [--json]``.

Vectors lie around a thousand centres, as those of texts on a thousand subjects do. Exact and indexed search, and numpy,
which holds all vectors in memory, rank the same ones; recall is the share of numpy's ten that were found. Shards are
searched in one process. Mark: recall 0.95; eight shards take at most twice as long as one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Benchmark, Mark, Row
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.indexes import INDEX_FROM
from cluster_tasks.shards.store import CollectionStore

DIMENSIONS, K, QUERIES, BATCH = 384, 10, 60, 4_000
WORDS = np.array([f"word{number}" for number in range(20_000)])
RECALL, TIMES = 0.95, 2.0
WHY_SLOWER = "LanceDB takes milliseconds of a core to ask a table, however small"
FIGURES = {"p50_ms": "p50, ms", "p99_ms": "p99, ms", "per_s": "searches/s"}
Array = NDArray[np.float32]


def vectors(rows: int, rng: np.random.Generator, centres: NDArray[Any]) -> Array:
    """Return unit vectors around the centres."""
    made = centres[rng.integers(0, len(centres), rows)] + 0.7 * rng.normal(size=(rows, DIMENSIONS))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def texts(rows: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield texts of sixty words, whose frequencies are those of a language (Zipf)."""
    for numbers in rng.zipf(1.2, (rows, 60)) % len(WORDS):
        yield " ".join(WORDS[numbers])


def fill(store: CollectionStore, stored: Array, words: list[str], collection: str = "docs") -> None:
    """Store the documents, in batches too small for the index to be built in between."""
    for start in range(0, len(stored), BATCH):
        part = slice(start, start + BATCH)
        documents = [Document(id=str(start + n), text=text) for n, text in enumerate(words[part])]
        store.upsert(collection, documents, stored[part], "model")


def timed(search: Callable[[int], list[int]]) -> tuple[dict[str, float], list[set[int]]]:
    """Run all queries, after some that warm up; return times in milliseconds, and what was found."""
    for number in range(5):
        search(number)
    found, took = [], []
    for number in range(QUERIES):
        began = time.perf_counter()
        found.append(set(search(number)))
        took.append((time.perf_counter() - began) * 1000)
    return {
        "p50_ms": median(took),
        "p99_ms": float(np.quantile(took, 0.99)),
        "per_s": 1000 * QUERIES / sum(took),
    }, found


def measure(rows: int) -> dict[str, dict[str, float]]:
    """Return what each way to search takes."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(1000, DIMENSIONS))
    stored, queries, words = vectors(rows, rng, centres), vectors(QUERIES, rng, centres), list(texts(rows, rng))
    results: dict[str, dict[str, float]] = {}

    def exactly(number: int) -> list[int]:
        similar = stored @ queries[number]
        best = np.argpartition(-similar, K)[:K]
        return [int(each) for each in best]

    results["numpy, in memory"], truth = timed(exactly)

    def add(name: str, store: CollectionStore, **options: Any) -> None:
        def search(number: int) -> list[int]:
            asked = None if options.get("mode") == "text" else queries[number]
            text = None if options.get("mode") == "vector" else " ".join(words[number].split()[:5])
            return [int(passage.id) for passage in store.search("docs", asked, K, text=text, **options)]

        results[name], found = timed(search)
        if options.get("mode") == "vector":
            shares = [len(ids & expected) / K for ids, expected in zip(found, truth, strict=True)]
            results[name]["recall"] = float(np.mean(shares))

    for shards in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            store = CollectionStore(folder, shards)
            fill(store, stored, words)
            label = f"{shards} shard{'s' * (shards > 1)}"
            add(f"{label}, exact", store, mode="vector")
            began = time.perf_counter()
            store.optimize("docs")
            results[f"{label}, upkeep"] = {"p50_ms": (time.perf_counter() - began) * 1000}
            if rows / shards >= INDEX_FROM:
                add(f"{label}, indexed", store, mode="vector")
            add(f"{label}, text", store, mode="text")
            add(f"{label}, hybrid", store, mode="hybrid")
    return results


def found(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each way to search; the ratio of eight shards is that to one."""
    results = measure(options.rows)
    for name, result in results.items():
        of_one = results.get(name.replace("8 shards", "1 shard")) if name.startswith("8") else None
        times = result["p50_ms"] / of_one["p50_ms"] if of_one else None
        figures = {FIGURES[key]: value for key, value in result.items() if key in FIGURES}
        mark = Mark(at_most=TIMES) if of_one and "upkeep" not in name else None
        yield Row(name, figures, ratio=times, mark=mark, reason=WHY_SLOWER)
        if "recall" in result:
            yield Row(f"{name}: recall", {"recall": result["recall"]}, mark=Mark(of="recall", at_least=RECALL))


def main() -> int:
    benchmark = Benchmark("retrieval", __doc__)
    benchmark.option("--rows", short=20_000, full=100_000, help="documents")
    return benchmark.run(found)


if __name__ == "__main__":
    sys.exit(main())
