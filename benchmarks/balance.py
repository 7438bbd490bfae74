"""Waiting and warmth of every strategy under load: ``python -m benchmarks.balance [--full] [--json]``.

Sixteen workers with a slot each. Jobs of 0.01, 0.1 and 1 s, a third each, come at random instants, as many as keep 0.7,
0.9 and 1.1 of the workers busy if nothing is ever warm. Each has a key, few keys being asked for often (Zipf, with the
skew of YCSB). A worker keeps the last keys warm, all workers together as many as there are keys, and a job whose key is
warm takes half as long.

The same jobs at the same instants are given to each strategy of the cluster, and to plain Celery in the two ways in
which it can be set up: *one queue* for all workers, and *static*, a queue for each worker and a key always to the same.
One at a time, on the same Redis, with workers that stay; what is warm of one is nothing to the others. Slowdown is how
many times as long a job took, from its call to its end, as on a free, cold worker.

Mark: for ``consistent_hash`` the p99 of the slowdown is no more than for one queue, with 1.5 times as many warm jobs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Zipf, arrivals, percentile
from benchmarks.fleet import Client, Done, Fleet, pace
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.sleeping import CLUSTER, STOCK, WARM_KEYS
from benchmarks.stage import private_redis, wait_until
from cluster_tasks.balancing import strategy_names
from cluster_tasks.router import STRATEGY_HEADER

SIZES_S = (0.01, 0.1, 1.0)
KEYS = 1_024
SKEW = 0.99
"""YCSB's."""
SHARED, STATIC = "Celery, one queue", "Celery, static"
MARKED = "consistent_hash"
MARK_WARM = 1.5
WHY = "a worker that has nothing to do takes what waits for another, wherever that is warm"
WHY_SLOW = "jobs wait in a line for each worker, not in the order in which they came"
OVER_S = 600.0
SHARED_QUEUE = "shared"


@dataclass(frozen=True, slots=True)
class Request:
    """A job as it will be sent."""

    at_s: float
    seconds: float
    key: str


def requests(rng: random.Random, workers: int, load: float, lasts_s: float) -> list[Request]:
    """Return the jobs that keep this share of the workers busy if nothing is warm."""
    zipf = Zipf(KEYS, SKEW)
    per_s = load * workers / (sum(SIZES_S) / len(SIZES_S))
    return [Request(at_s, rng.choice(SIZES_S), f"key{zipf.draw(rng)}") for at_s in arrivals(rng, per_s, lasts_s)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the jobs of one way to choose workers."""

    p50: float
    p99: float
    warm: float
    """Share of the jobs."""

    @classmethod
    def of(cls, done: Sequence[Done]) -> Outcome:
        """Sum it up."""
        slowdowns = [job.slowdown for job in done]
        return cls(percentile(slowdowns, 0.5), percentile(slowdowns, 0.99), sum(job.warm for job in done) / len(done))


def row(name: str, load: float, outcome: Outcome, shared: Outcome) -> Row:
    """Return it for the table; the ratio is that of the slowdown to the one of one queue."""
    return Row(
        f"{load:g} {name}",
        {
            "slowdown p50": outcome.p50,
            "slowdown p99": outcome.p99,
            "warm, %": 100 * outcome.warm,
            "warm ratio": _warmer(outcome, shared),
        },
        ratio=outcome.p99 / shared.p99,
        mark=Mark(at_most=1.0) if name == MARKED else None,
        reason=f"{WHY_SLOW}, and with {100 * outcome.warm:.0f} % that are warm little makes up for that",
    )


def warm_row(load: float, outcome: Outcome, shared: Outcome, static: Outcome) -> Row:
    """Return the second mark of the strategy that has one."""
    most, slowdown = _warmer(static, shared), static.p99 / shared.p99
    return Row(
        f"{load:g} {MARKED}, warm", {"warm, %": 100 * outcome.warm}, ratio=_warmer(outcome, shared),
        mark=Mark(at_least=MARK_WARM),
        reason=f"{WHY}; the static queues, where none does, have {most:.2f} times at {slowdown:.1f} times the slowdown",
    )  # fmt: skip


def _warmer(outcome: Outcome, shared: Outcome) -> float:
    return outcome.warm / shared.warm if shared.warm else float("nan")


class Bench:
    """The workers of both, and who sends them jobs."""

    def __init__(self, clients: dict[str, Client], workers: int) -> None:
        self._clients, self._workers, self._turns = clients, workers, 0

    def turn(self, name: str, jobs: Sequence[Request]) -> Outcome:
        """Send the jobs at their instants; return what came of them when all have ended."""
        client, options = self._way(name)
        self._turns += 1
        sent, begun_s = [], time.monotonic()
        for job in jobs:
            pace(job.at_s, begun_s)
            # What was warm in the turn before is not in this.
            sent.append(client.send(job.seconds, f"{self._turns} {job.key}", **options(job)))
        client.forget()
        wait_until(lambda: client.ended(sent) == len(sent), OVER_S, every_s=0.2)
        return Outcome.of(client.done(sent))

    def _way(self, name: str) -> tuple[Client, Callable[[Request], dict[str, Any]]]:
        if name == SHARED:
            return self._clients[STOCK], lambda _: {"queue": SHARED_QUEUE}
        if name == STATIC:
            return self._clients[STOCK], lambda job: {
                "queue": static_queue(zlib.crc32(job.key.encode()) % self._workers)
            }
        return self._clients[CLUSTER], lambda _: {"headers": {STRATEGY_HEADER: name}}


def static_queue(number: int) -> str:
    """The queue of one worker."""
    return f"static{number}"


benchmark = Benchmark("balance", __doc__)
benchmark.option("--workers", short=16, full=16, help="of each of the two")
benchmark.option("--loads", short=[0.9], full=[0.7, 0.9, 1.1], nargs="+", type=float, help="shares of the workers")
benchmark.option("--lasts-s", short=10.0, full=60.0, help="seconds of each turn")
benchmark.option("--strategy", short=[MARKED], full=strategy_names(), nargs="+", type=str, help="of the cluster")
benchmark.option("--seed", short=1, full=1, help="of what is left to chance")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    workers = options.workers
    with private_redis() as server, ExitStack() as stack:
        environ = {WARM_KEYS: str(KEYS // workers)}
        fleets = {variant: stack.enter_context(Fleet(server, variant, environ=environ)) for variant in (STOCK, CLUSTER)}
        names = [f"n{number}@fleet" for number in range(workers)]
        fleets[CLUSTER].start_coordinator()
        fleets[CLUSTER].start(names)
        fleets[STOCK].start(names, lambda name: ["-Q", f"{SHARED_QUEUE},{static_queue(names.index(name))}"])
        for fleet in fleets.values():
            fleet.wait_ready()
        clients = {variant: stack.enter_context(Client(server.url, variant)) for variant in fleets}
        bench = Bench(clients, workers)
        for load in options.loads:
            jobs = requests(random.Random(options.seed), workers, load, options.lasts_s)
            shared = bench.turn(SHARED, jobs)
            yield row(SHARED, load, shared, shared)
            static = bench.turn(STATIC, jobs)
            yield row(STATIC, load, static, shared)
            for name in options.strategy:
                outcome = bench.turn(name, jobs)
                yield row(name, load, outcome, shared)
                if name == MARKED:
                    yield warm_row(load, outcome, shared, static)


if __name__ == "__main__":
    sys.exit(benchmark.run(measure))
