"""What a collection takes of memory and of its disk: ``python -m benchmarks.memory [--full] [--json]``.

Collections of one shard and two sizes are made, indexes included. A process of its own reads the indexes of one, as a
node does that is assigned the shard, and searches it; what it holds then and no other process does, less what it held
after it had searched a collection of a hundred documents, is the memory. What the system keeps of files it has read is
not in it: the system takes that back. The last row is the line through both sizes: what a million more take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from benchmarks.figures import line
from benchmarks.report import Benchmark, Row
from benchmarks.retrieval import DIMENSIONS, QUERIES, K, fill, texts, vectors
from cluster_tasks.shards.store import CollectionStore

SMALL, MIB, MILLION = 100, 1 << 20, 1_000_000
VECTORS, ALL, DISK = "searched by vectors, MiB", "and by words, MiB", "on disk, MiB"


def store(folder: str, rows: int) -> None:
    """Make a collection of so many documents, and one of a few."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(1000, DIMENSIONS))
    for collection, size in (("small", SMALL), ("docs", rows)):
        kept = CollectionStore(folder, 1)
        fill(kept, vectors(size, rng, centres), list(texts(size, rng)), collection)
        kept.optimize(collection)


def held(folder: str) -> dict[str, float]:
    """Return what this process holds in MiB, more than for a small collection, after the searches of each kind."""
    rng = np.random.default_rng(2)
    asked = vectors(QUERIES, rng, rng.normal(size=(1000, DIMENSIONS)))
    words = [" ".join(text.split()[:5]) for text in texts(QUERIES, rng)]
    kept, process = CollectionStore(folder, 1), psutil.Process()

    def search(collection: str, mode: str) -> float:
        for vector, text in zip(asked, words, strict=True):
            kept.search(collection, None if mode == "text" else vector, K, text=None if mode == "vector" else text,
                        mode=mode)  # fmt: skip
        return process.memory_full_info().uss / MIB

    before = max(search("small", mode) for mode in ("vector", "hybrid"))
    kept.warm("docs")
    return {VECTORS: search("docs", "vector") - before, ALL: search("docs", "hybrid") - before}


def measured(rows: int) -> Mapping[str, float]:
    """Return what so many documents take."""
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        # What a process has held to make a collection would be in what it holds to search it.
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
            processes.submit(store, folder, rows).result()
            figures = processes.submit(held, folder).result()
        on_disk = sum(file.stat().st_size for file in Path(folder).glob("docs.*/**/*") if file.is_file())
    return {**figures, DISK: on_disk / MIB}


def found(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what each size takes, and what a million more would."""
    sizes = options.rows
    by_size = [measured(rows) for rows in sizes]
    for rows, figures in zip(sizes, by_size, strict=True):
        yield Row(f"{rows:,} documents", figures)
    slopes = {name: line(sizes, [figures[name] for figures in by_size])[1] for name in by_size[0]}
    yield Row("a million more", {name: slope * MILLION for name, slope in slopes.items()})


def main() -> int:
    benchmark = Benchmark("memory", __doc__)
    benchmark.option("--rows", short=[5_000, 15_000], full=[100_000, 300_000], nargs=2, type=int, help="documents")
    return benchmark.run(found)


if __name__ == "__main__":
    sys.exit(main())
