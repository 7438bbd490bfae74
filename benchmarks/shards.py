"""What a search over two nodes costs, and the memory they take: ``python -m benchmarks.shards [--rows N] [--json]``.

The same documents lie in a collection of one shard and in one of eight, whose shards are spread over two nodes; one
caller asks both in turn and waits for each answer, so a figure has everything in it: publishing, the jobs of both
nodes, the merge, reading the result. Memory is that of both nodes together, before they hold anything and after all
searches. Mark: eight shards cost at most twice what one costs, at the median.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.retrieval import DIMENSIONS, Array, K, fill, texts, vectors
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError
from cluster_tasks.shards.store import CollectionStore
from workers.local import NODE, LocalCluster, Plan

NODES, SHARDS, QUERIES, WARMING = 2, 8, 100, 10
ONE, EIGHT = "one", "eight"
TIMES = 2.0
READY_S, ANSWER_S = 180.0, 60.0
SEARCH = "retrieval.search"
MIB = 1 << 20


def store_both(folder: Path, rows: int) -> tuple[Array, list[str]]:
    """Store the documents twice, indexes included; return vectors and texts to search with."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(1000, DIMENSIONS))
    stored, asked, words = vectors(rows, rng, centres), vectors(QUERIES, rng, centres), list(texts(rows, rng))
    for collection, shards in ((ONE, 1), (EIGHT, SHARDS)):
        store = CollectionStore(str(folder), shards)
        fill(store, stored, words, collection)
        store.optimize(collection)
    return asked, [" ".join(words[number].split()[:5]) for number in range(QUERIES)]


def wait_until_ready(cluster: Cluster) -> None:
    """Wait until every shard is in memory where it is to be. Raises ClusterError if that takes too long."""
    deadline = time.monotonic() + READY_S
    while not all(_is_ready(cluster, collection) for collection in (ONE, EIGHT)):
        if time.monotonic() > deadline:
            raise ClusterError(f"the shards were not in memory within {READY_S:g} s")
        time.sleep(0.1)


def _is_ready(cluster: Cluster, collection: str) -> bool:
    found = cluster.assignments.whereabouts(collection)
    shares = cluster.shard_map.shares(collection)
    nodes = {ONE: 1, EIGHT: NODES}[collection]
    return (
        found is not None
        and list(found.ready) == list(map(frozenset, found.assigned.nodes))
        and shares is not None
        and len(shares.of_nodes) == nodes
    )


def timed(local: LocalCluster, questions: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Ask both collections in turn; return what each answer took, in milliseconds."""
    search, taken = local.app.tasks[SEARCH], dict[str, list[float]]({ONE: [], EIGHT: []})
    for number, question in enumerate([*questions[:WARMING], *questions]):
        for collection in (ONE, EIGHT) if number % 2 else (EIGHT, ONE):
            began = time.perf_counter()
            found = search.delay(collection, k=K, **question).get(timeout=ANSWER_S)
            taken[collection].append((time.perf_counter() - began) * 1000)
            assert len(found["passages"]) == K, found
    return {collection: times[WARMING:] for collection, times in taken.items()}


def memory(local: LocalCluster) -> int:
    """Return what both nodes hold that no other process does, in bytes."""
    family = psutil.Process().children(recursive=True)
    nodes = [process for process in family if any(word.startswith(NODE) for word in process.cmdline())]
    assert len(nodes) >= local.plan.nodes, [process.cmdline() for process in family]
    return sum(process.memory_full_info().uss for process in nodes)


def measure(rows: int, pool: str) -> dict[str, Any]:
    """Return what each way to search takes, and the memory of the nodes."""
    os.environ |= {"CLUSTER_ROLES": "worker,cache", "CLUSTER_SHARD_REPLICAS": "1"}
    with tempfile.TemporaryDirectory(prefix="shards-") as name:
        folder = Path(name)
        with LocalCluster(Plan(folder, NODES, pool=pool, cache=False)) as local:
            if missing := local.wait_for_all():
                raise ClusterError(f"{missing} did not start: {local.last_words(missing[0])}")
            local.app.loader.import_default_modules()
            before = memory(local)
            asked, words = store_both(folder, rows)
            wait_until_ready(local.cluster)
            ways = {
                "vector": [{"vector": vector.tolist()} for vector in asked],
                "text": [{"query": text, "mode": "text"} for text in words],
            }
            searches = [_row(way, timed(local, questions)) for way, questions in ways.items()]
            held = memory(local) - before
    return {
        "rows": rows, "pool": pool, "searches": searches, "memory_mib": held / MIB,
        "memory_mib_per_million": held / MIB / (2 * rows) * 1e6, "mark": TIMES,
        "met": all(row["ratio"] <= TIMES for row in searches),
    }  # fmt: skip


def _row(way: str, taken: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"mode": way}
    for collection, times in taken.items():
        row |= {f"{collection}_p50_ms": median(times), f"{collection}_p99_ms": float(np.quantile(times, 0.99))}
    return row | {"ratio": row[f"{EIGHT}_p50_ms"] / row[f"{ONE}_p50_ms"]}


def show(result: Mapping[str, Any]) -> None:
    """Print it for people."""
    print(f"{result['rows']} documents of {DIMENSIONS} dimensions, {NODES} nodes of pool {result['pool']}")
    for row in result["searches"]:
        print(
            f"{row['mode']:>8}  1 shard p50 {row['one_p50_ms']:6.1f} p99 {row['one_p99_ms']:6.1f} ms   "
            f"{SHARDS} shards p50 {row['eight_p50_ms']:6.1f} p99 {row['eight_p99_ms']:6.1f} ms   "
            f"ratio {row['ratio']:.2f}  {'met' if row['ratio'] <= TIMES else 'missed'}"
        )
    print(f"memory of the nodes: {result['memory_mib']:.0f} MiB, {result['memory_mib_per_million']:.0f} a million")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pool", choices=("threads", "prefork"), default="threads")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for variable in [name for name in os.environ if name.startswith(("CLUSTER_", "CELERY_"))]:
        # Nothing of the caller's cluster may be in the figures.
        del os.environ[variable]
    result = measure(options.rows, options.pool)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
