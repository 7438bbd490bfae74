"""What a search over two nodes costs, and the memory they take: ``python -m benchmarks.shards [--full] [--json]``.

The same documents lie in a collection of one shard and in one of eight, whose shards are spread over two nodes; one
caller asks both in turn and waits for each answer, so a figure has everything in it: publishing, the jobs of both
nodes, the merge, reading the result. What the nodes take of the processors meanwhile says where it goes. Memory is that
of both nodes together, before they hold anything and after all searches. Mark: eight shards cost at most twice what one
costs, at the median.

"The store alone" is the same searches in this process, without jobs, in processor time. Its ratio is half of what eight
tables take, as each node has half of them, to what one takes: what is left when everything but the store costs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.report import Benchmark, Mark, Row
from benchmarks.retrieval import DIMENSIONS, Array, K, fill, texts, vectors
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError
from cluster_tasks.shards.store import CollectionStore
from workers.local import NODE, LocalCluster, Plan

NODES, SHARDS, QUERIES, WARMING = 2, 8, 100, 10
ONE, EIGHT = "one", "eight"
NAMED = ((ONE, "1 shard"), (EIGHT, f"{SHARDS} shards"))
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


@dataclass
class Taken:
    """What the answers of one collection took, in milliseconds."""

    each: list[float] = field(default_factory=list)
    processor: float = 0.0
    """Of all nodes, for all answers."""


def timed(local: LocalCluster, questions: Sequence[Mapping[str, Any]]) -> dict[str, Taken]:
    """Ask both collections in turn, and return what that took."""
    search, nodes = local.app.tasks[SEARCH], processes(local)
    for question in questions[:WARMING]:
        for collection in (ONE, EIGHT):
            search.delay(collection, k=K, **question).get(timeout=ANSWER_S)
    taken = {ONE: Taken(), EIGHT: Taken()}
    for number, question in enumerate(questions):
        for collection in (ONE, EIGHT) if number % 2 else (EIGHT, ONE):
            used, began = processor_ms(nodes), time.perf_counter()
            found = search.delay(collection, k=K, **question).get(timeout=ANSWER_S)
            taken[collection].each.append((time.perf_counter() - began) * 1000)
            taken[collection].processor += processor_ms(nodes) - used
            assert len(found["passages"]) == K, found
    return taken


def store_alone(folder: Path, questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a search takes of a processor by collection, in milliseconds, without any job."""
    store, taken = CollectionStore(str(folder)), dict.fromkeys((ONE, EIGHT), 0.0)
    for number, question in enumerate([*questions[:WARMING], *questions]):
        for collection in taken:
            began = time.process_time()
            store.search(collection, question.get("vector"), K, text=question.get("query"), mode=question.get("mode"))
            if number >= WARMING:
                taken[collection] += (time.process_time() - began) * 1000 / len(questions)
    return taken


def processes(local: LocalCluster) -> list[psutil.Process]:
    """Return the processes of both nodes."""
    family = psutil.Process().children(recursive=True)
    nodes = [process for process in family if any(word.startswith(NODE) for word in process.cmdline())]
    assert len(nodes) >= local.plan.nodes, [process.cmdline() for process in family]
    return nodes


def processor_ms(nodes: Sequence[psutil.Process]) -> float:
    """Return what the processes have taken of the processors so far."""
    return 1000 * sum(sum(process.cpu_times()[:2]) for process in nodes)


def memory(local: LocalCluster) -> int:
    """Return what both nodes hold that no other process does, in bytes."""
    return sum(process.memory_full_info().uss for process in processes(local))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what each way to search takes, and the memory of the nodes."""
    os.environ |= {"CLUSTER_ROLES": "worker,cache", "CLUSTER_SHARD_REPLICAS": "1"}
    rows = options.rows
    with tempfile.TemporaryDirectory(prefix="shards-") as name:
        folder = Path(name)
        with LocalCluster(Plan(folder, NODES, pool=options.pool, cache=False)) as local:
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
            taken = {way: timed(local, questions) for way, questions in ways.items()}
            held = memory(local) - before
        for way, questions in ways.items():
            alone = store_alone(folder, questions)
            least = alone[EIGHT] / NODES / alone[ONE]
            yield _row(way, taken[way], least)
            figures = {f"{shards}, processor, ms": alone[name] for name, shards in NAMED}
            yield Row(f"{way}, the store alone", figures, ratio=least)
    yield Row("memory of the nodes", {"MiB": held / MIB, "MiB a million": held / MIB / (2 * rows) * 1e6})


def _row(way: str, taken: Mapping[str, Taken], least: float) -> Row:
    middle = {collection: median(times.each) for collection, times in taken.items()}
    figures = {}
    for collection, shards in NAMED:
        figures |= {
            f"{shards}, p50, ms": middle[collection],
            f"{shards}, p99, ms": float(np.quantile(taken[collection].each, 0.99)),
            f"{shards}, processor of the nodes, ms": taken[collection].processor / len(taken[collection].each),
        }
    reason = f"the store alone takes {least:.1f} times: LanceDB needs milliseconds to ask a table, however small"
    return Row(way, figures, ratio=middle[EIGHT] / middle[ONE], mark=Mark(at_most=TIMES), reason=reason)


def main() -> int:
    benchmark = Benchmark("shards", __doc__)
    benchmark.option("--rows", short=10_000, full=100_000, help="documents")
    benchmark.parser.add_argument("--pool", choices=("threads", "prefork"), default="threads")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
