"""Embedding requests per second, end to end, one by one and many in a message: ``python -m benchmarks.batching``.

One Redis and one node, both started here, with the provider ``local-hash``; each request is a job with a short text, an
id and a result of its own. In each round the same process sends requests in three ways and reads all their results: by
one ``delay()`` each, of which the node does up to 64 in one call when they wait; by one ``delay()`` each, all done one
by one; and by ``cluster.submit`` and ``get()``. The time is that from the first call to the last result read, as lists
of numbers; the node has been at work before. It has two processes or threads, or one process (solo).

Producer, node and Redis share the machine, and what they use of its processors is told for each request: on a machine
that does other work that says more than the time, and the ratio more than both. Medians of the rounds count. The ratio
is that to one ``delay()`` each without batches.

Mark: 10,000 requests a second by ``submit``, on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from celery import Celery

from benchmarks.figures import in_turn
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.stage import Worker, celery_worker, private_redis, wait_until
from benchmarks.throughput import POOLS, SLOTS
from cluster_tasks import Cluster
from cluster_tasks.tasks import embedding

MARK = 10_000
ONE_BY_ONE, BATCHED, SUBMITTED = "delay, one by one", "delay, in batches", "submit"
NODE = "node1@benchmark"
START_S, END_S = 60.0, 300.0
WHY_SLOWER = (
    "two processors have 200 µs for each of 10,000 requests a second; with both at work a vector takes 40 µs to make, "
    "12 as a list, 35 to write and 45 to read as JSON, and Redis 55"
)
"""By ``submit``; what is left are the arguments, ids and results of each request."""
PER_S, CPU = "requests/s", "processor a request, µs"
Measured = Mapping[str, tuple[float, float]]
"""Requests per second, and microseconds of processors for each, by way."""


class Bench:
    """One node, and who asks it for vectors."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url, self._directory, self._asked = url, directory, 0
        self._app = Celery("embedding", broker=url, backend=url, set_as_current=False)
        self._cluster = Cluster(self._app)
        self._embed = self._app.tasks[embedding.EMBED]
        self._batch = self._embed.batch

    def rounds(self, pool: str, options: argparse.Namespace) -> list[Measured]:
        """Return what each round found."""
        with self._node(pool, SLOTS[pool]) as node:
            self._submit(1000)
            self._delay(64)
            turns = []
            for number in range(options.rounds):
                ways = {
                    ONE_BY_ONE: (self._delay_alone, options.alone),
                    BATCHED: (self._delay, options.alone),
                    SUBMITTED: (self._submit, options.requests),
                }
                turns.append({name: self._measure(*ways[name], node) for name in in_turn(ways, number)})
            return turns

    def close(self) -> None:
        """Give up all connections."""
        self._app.close()

    def _measure(self, way: Callable[[int], None], count: int, node: Worker) -> tuple[float, float]:
        used_s, begun_s = self._used_s(node), time.perf_counter()
        way(count)
        took_s = time.perf_counter() - begun_s
        return count / took_s, (self._used_s(node) - used_s) / count * 1e6

    def _used_s(self, node: Worker) -> float:
        """Seconds of processors that all three have used so far."""
        times = [process.cpu_times() for process in (psutil.Process(), *node.family())]
        server: Any = self._cluster.client.info("cpu")
        used_by_server = server["used_cpu_user"] + server["used_cpu_sys"]
        return float(sum(each.user + each.system for each in times) + used_by_server)

    def _delay(self, count: int) -> None:
        results = [self._embed.delay(text) for text in self._texts(count)]
        _check([result.get(timeout=END_S) for result in results])

    def _delay_alone(self, count: int) -> None:
        # The message says whether a job may be done with others.
        self._embed.batch = 1
        try:
            self._delay(count)
        finally:
            self._embed.batch = self._batch

    def _submit(self, count: int) -> None:
        _check(self._cluster.submit(self._embed, self._texts(count)).get(timeout=END_S))

    def _texts(self, count: int) -> list[str]:
        self._asked += count
        return [f"what do we know about subject {number}?" for number in range(self._asked - count, self._asked)]

    @contextmanager
    def _node(self, pool: str, slots: int) -> Iterator[Worker]:
        environ = {"CLUSTER_BROKER_URL": self._url, "CLUSTER_DATA_DIR": str(self._directory / "data")}
        log = self._directory / f"{pool}.log"
        with celery_worker("cluster_tasks", NODE, pool, slots, log, environ) as worker:
            wait_until(self._cluster.nodes, START_S, [worker])
            yield worker


def _check(results: list[Any]) -> None:
    assert all(len(result["vectors"][0]) == result["dimension"] for result in results)


def rows(pool: str, slots: int, rounds: Sequence[Measured]) -> Iterator[Row]:
    """Yield what the rounds of a pool say."""
    for way in (ONE_BY_ONE, BATCHED, SUBMITTED):
        yield Row(
            f"{pool} -c {slots}, {way}",
            {PER_S: median(row[way][0] for row in rounds), CPU: median(row[way][1] for row in rounds)},
            ratio=median(row[way][0] / row[ONE_BY_ONE][0] for row in rounds),
            mark=Mark(of=PER_S, at_least=MARK) if way == SUBMITTED else None,
            reason=WHY_SLOWER,
        )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield three rows for each pool."""
    for pool in options.pools:
        with private_redis() as server:
            bench = Bench(server.url, server.directory)
            try:
                yield from rows(pool, SLOTS[pool], bench.rounds(pool, options))
            finally:
                bench.close()


def main() -> int:
    benchmark = Benchmark("batching", __doc__)
    benchmark.option("--requests", short=5_000, full=20_000, help="by submit, in each round")
    benchmark.option("--alone", short=300, full=2_000, help="by delay, in each round")
    benchmark.option("--rounds", short=2, full=3, help="rounds of each pool")
    benchmark.option("--pools", short=["solo"], full=[*POOLS], type=str, nargs="+", choices=POOLS, help="which ones")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
