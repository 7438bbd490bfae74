"""How many requests are answered in time while nodes die: ``python -m benchmarks.availability [--full] [--json]``.

One Redis, on which a cluster and plain Celery work side by side: as many workers each, with the same slots, half of
which a steady load of requests of one second fills, sent at the same random instants to both. Every now and then a
worker gets a SIGKILL, the same of both at the same instant; a supervisor starts it again a second later, under the same
name.

Celery is set up as its guide advises for this: late acknowledgement, one message in advance, rejected if the worker is
lost, and a ``visibility_timeout``, after which Redis' messages are delivered again, of five seconds instead of an hour:
less would run requests twice that only wait. The cluster has its defaults.

Counted is the share of requests that ended within ten seconds of their call, of all that were sent.

Mark: more than 99.9 % in the cluster.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.figures import percentile
from benchmarks.fleet import Client, Done, Fleet, Sent, Steady
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.sleeping import CLUSTER, STOCK, STOCK_VISIBILITY
from benchmarks.stage import private_redis
from workers.redis_server import RedisServer

JOB_S = 1.0
BUSY = 0.5
IN_TIME_S = 10.0
RESTART_S = 1.0
VISIBILITY_S = 5
MARK_PERCENT = 99.9
VARIANTS = (STOCK, CLUSTER)


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of the requests to one variant."""

    sent: int
    waited_s: tuple[float, ...]
    """Of those that were answered."""

    @classmethod
    def of(cls, sent: Sequence[Sent], done: Sequence[Done]) -> Answers:
        """Count them."""
        return cls(len(sent), tuple(job.waited_s for job in done))

    @property
    def in_time_percent(self) -> float:
        """Share of all that were answered in time."""
        return 100 * sum(waited <= IN_TIME_S for waited in self.waited_s) / self.sent if self.sent else 0.0

    def figures(self, kills: int) -> dict[str, float]:
        """Return what the table shows."""
        return {
            "requests": self.sent,
            "kills": kills,
            "in time, %": self.in_time_percent,
            "late": sum(waited > IN_TIME_S for waited in self.waited_s),
            "no answer": self.sent - len(self.waited_s),
            "p50, s": percentile(self.waited_s, 0.5) if self.waited_s else float("nan"),
            "p99, s": percentile(self.waited_s, 0.99) if self.waited_s else float("nan"),
        }


def instants(lasts_s: float, every_s: float) -> list[float]:
    """When workers are killed: every so often, and the last time early enough to be of consequence."""
    return [number * every_s for number in range(1, int(lasts_s / every_s) + 1) if number * every_s < lasts_s]


def run(server: RedisServer, options: argparse.Namespace) -> dict[str, Answers]:
    """Return what came of the requests, by variant."""
    rng = random.Random(options.seed)
    with ExitStack() as stack:
        environ = {STOCK: {STOCK_VISIBILITY: str(VISIBILITY_S)}, CLUSTER: {}}
        fleets = {
            variant: stack.enter_context(Fleet(server, variant, options.slots, environ[variant]))
            for variant in VARIANTS
        }
        names = [f"n{number}@fleet" for number in range(options.workers)]
        fleets[CLUSTER].start_coordinator()
        for fleet in fleets.values():
            fleet.start(names)
        for fleet in fleets.values():
            fleet.wait_ready()
        clients = {variant: stack.enter_context(Client(server.url, variant)) for variant in VARIANTS}
        per_s = options.workers * options.slots * BUSY / JOB_S
        loads = {
            variant: Steady(client, per_s, JOB_S, random.Random(options.seed)) for variant, client in clients.items()
        }
        with loads[STOCK], loads[CLUSTER]:
            _kill_now_and_then(list(fleets.values()), names, instants(options.lasts_s, options.every_s), options, rng)
        # Later than that an answer counts as none.
        time.sleep(IN_TIME_S)
        return {variant: Answers.of(load.jobs, clients[variant].done(load.jobs)) for variant, load in loads.items()}


def _kill_now_and_then(
    fleets: Sequence[Fleet], names: Sequence[str], at: Sequence[float], options: argparse.Namespace, rng: random.Random
) -> None:
    begun_s = time.monotonic()
    for instant in at:
        time.sleep(max(0.0, begun_s + instant - time.monotonic()))
        victim = rng.choice(names)
        for fleet in fleets:
            fleet.kill(victim)
        time.sleep(RESTART_S)
        for fleet in fleets:
            fleet.start([victim])
    time.sleep(max(0.0, begun_s + options.lasts_s - time.monotonic()))


benchmark = Benchmark("availability", __doc__)
benchmark.option("--lasts-s", short=20.0, full=600.0, help="seconds of load")
benchmark.option("--every-s", short=10.0, full=20.0, help="seconds from kill to kill")
benchmark.option("--workers", short=8, full=8, help="of each of the two")
benchmark.option("--slots", short=2, full=2, help="of each worker")
benchmark.option("--seed", short=1, full=1, help="of what is left to chance")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with private_redis() as server:
        answers = run(server, options)
    kills = len(instants(options.lasts_s, options.every_s))
    stock, cluster = answers[STOCK], answers[CLUSTER]
    yield Row("plain Celery", stock.figures(kills))
    yield Row(
        "cluster", cluster.figures(kills),
        ratio=cluster.in_time_percent / stock.in_time_percent if stock.in_time_percent else None,
        mark=Mark(of="in time, %", above=MARK_PERCENT),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(benchmark.run(measure))
