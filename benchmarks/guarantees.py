"""What the guarantees of a cluster cost: ``python -m benchmarks.guarantees [--full] [--json]``.

A cluster takes turns with one in which a single guarantee is switched off, here alone (``benchmarks.guaranteed``):

- the fenced commit: a result is stored, and a delivery let go, only if the node holds the job still. Without it results
  are stored as Celery does, and the delivery is let go with the next fetch;
- the doorbell: who publishes to an idle node rings, and nobody polls. Without it a node looks every 10 ms;
- the heartbeat, with all that a node does by the clock: load, watching the others, revocations. Without it each of
  these is done once in ten minutes.

Throughput is that of ``benchmarks.throughput``, with one worker. The doorbell has a part in it only where nodes idle,
so it is also measured by jobs that are sent one at a time, each when the one before has been answered: what ``delay()``
costs, and how long the answer takes. The price is how much less is done, or how much longer it takes, than without;
where it is negative, the guarantee is the better way to do it. Medians of rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import guaranteed
from benchmarks.figures import in_turn
from benchmarks.guaranteed import UNFENCED, UNRUNG
from benchmarks.noop import CLUSTER, VARIANT
from benchmarks.peers import job
from benchmarks.report import Benchmark, Row
from benchmarks.stage import celery_worker, private_redis
from benchmarks.throughput import Bench

UNWATCHED = "without the heartbeat"
SELDOM = {"CLUSTER_HEARTBEAT_S": "600", "CLUSTER_HEALTH_CHECK_S": "600", "CLUSTER_LEASE_S": "3000"}
NAMES = {UNFENCED: "fenced commit", UNRUNG: "doorbell", UNWATCHED: "heartbeat"}
WITH, WITHOUT, PRICE = "with", "without", "price, %"
ANSWER_S = 60.0


def throughput(bench: Bench, without: str, pool: str, results: bool, rounds: int) -> Row:
    """Return what a guarantee costs a worker that has plenty to do."""
    more = SELDOM if without == UNWATCHED else {}
    variant = CLUSTER if without == UNWATCHED else without

    def turn(whole: bool) -> float:
        if whole:
            return bench.celery(CLUSTER, pool, 1, results, guaranteed)
        return bench.celery(variant, pool, 1, results, guaranteed, more)

    rates = in_turns(turn, rounds)
    what = f"{NAMES[without]}: {pool}, {'results' if results else 'no results'}"
    figures = {f"{way}, jobs/s": median(row[way] for row in rates) for way in (WITH, WITHOUT)}
    ratio = median(row[WITH] / row[WITHOUT] for row in rates)
    return Row(what, {**figures, PRICE: (1 - ratio) * 100}, ratio=ratio)


def in_turns(turn: Any, rounds: int) -> list[dict[str, float]]:
    """Return what a turn says with and without, for each round, in the other direction every second one."""
    return [
        {WITH if whole else WITHOUT: turn(whole) for whole in in_turn((True, False), number)}
        for number in range(rounds)
    ]


class OneByOne:
    """Jobs that are sent when the one before has been answered, so that the node is idle each time."""

    def __init__(self, url: str, directory: Any, jobs: int) -> None:
        self._url, self._directory, self._jobs = url, directory, jobs

    def taken_us(self, variant: str) -> tuple[float, float]:
        """Return what ``delay()`` takes, and what passes until the answer is there."""
        app = guaranteed.make_app(variant, self._url)
        environ = {VARIANT: variant, job.REDIS_URL: self._url, job.RESULTS: "1"}
        log = self._directory / "one by one.log"
        with celery_worker("benchmarks.guaranteed", "node1@benchmark", "threads", 1, log, environ):
            task, sent, answered = app.tasks["noop"], [], []
            task.delay().get(timeout=ANSWER_S)
            for _ in range(self._jobs):
                begin = time.perf_counter()
                result = task.delay()
                sent.append(time.perf_counter() - begin)
                result.get(timeout=ANSWER_S)
                answered.append(time.perf_counter() - begin)
        app.close()
        return median(sent) * 1e6, median(answered) * 1e6

    def rows(self, rounds: int) -> Iterator[Row]:
        """Yield what the doorbell costs."""
        found = in_turns(lambda whole: self.taken_us(CLUSTER if whole else UNRUNG), rounds)
        for place, what in enumerate(("delay() to an idle node", "an idle node's answer")):
            yield self._row(what, [{way: row[way][place] for way in row} for row in found])  # type: ignore[index]

    def _row(self, what: str, rounds: Sequence[Mapping[str, float]]) -> Row:
        figures = {f"{way}, µs": median(row[way] for row in rounds) for way in (WITH, WITHOUT)}
        ratio = median(row[WITH] / row[WITHOUT] for row in rounds)
        return Row(f"{NAMES[UNRUNG]}: {what}", {**figures, PRICE: (ratio - 1) * 100}, ratio=ratio)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the price of each guarantee."""
    with private_redis() as server:
        bench = Bench(server.url, server.directory, options.jobs)
        try:
            for pool in options.pools:
                for without in NAMES:
                    # Without results a commit is a round trip that Celery does not make at all.
                    for results in (True, False) if without == UNFENCED else (True,):
                        yield throughput(bench, without, pool, results, options.rounds)
            yield from OneByOne(server.url, server.directory, options.answers).rows(options.rounds)
        finally:
            bench.close()


def main() -> int:
    benchmark = Benchmark("guarantees", __doc__)
    pools = ["prefork", "threads", "solo"]
    benchmark.option("--jobs", short=400, full=2_000, help="jobs of each turn")
    benchmark.option("--answers", short=150, full=1_000, help="jobs that are sent one at a time")
    benchmark.option("--rounds", short=1, full=3, help="rounds of each row")
    benchmark.option("--pools", short=["threads"], full=pools, type=str, nargs="+", choices=pools, help="which ones")
    benchmark.note("ratio: with over without, of jobs/s or of the time; price: what that is in percent of without.")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
