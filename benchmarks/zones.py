"""What staying in a datacentre costs, by ``zone_bound``: ``python -m benchmarks.zones [--full] [--json]``.

A simulation in which only time is made up: placing is done by the project's own zones and ``least_connection``, each
caller with a view of its own that is up to 0.25 s old; nodes take from the longest list when they have nothing to do,
and an idle node is rung as the broker does it. Two zones of eight nodes with four slots; jobs take 0.1, 1 or 10 s. The
callers of one zone send half of all jobs, or four fifths. Told are the share of the jobs that were run in the zone of
their caller, the mean wait, and the 99th percentile of slowdown: the time from sending to end, by the time of the job.
All bounds, and callers that know no zones, are given the same jobs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from statistics import mean

from benchmarks.figures import percentile
from benchmarks.report import Benchmark, Row
from cluster_tasks.balancing import LeastConnection
from cluster_tasks.balancing.zones import Zones
from cluster_tasks.model import ZONE, Capacity, Load, Node, Request

ZONES, NODES, SLOTS = "ab", 8, 4
SNAPSHOT_S = 0.25
DURATIONS_S, WEIGHTS = (0.1, 1.0, 10.0), (60, 30, 10)
BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, inf)
SHARES = {"half": 0.5, "four fifths": 0.8}
"""Of the jobs, that the callers of the first zone send."""
IN_ZONE, WAIT, SLOWDOWN = "run in their zone, %", "mean wait, s", "p99 slowdown"


@dataclass(slots=True)
class Job:
    """A job and when it was sent."""

    zone: str
    sent_s: float
    lasts_s: float


@dataclass(slots=True)
class Worker:
    """A node of the simulation."""

    id: str
    zone: str
    free: int = SLOTS
    idle_since_s: float = 0.0
    listed: deque[Job] = field(default_factory=deque)

    def seen(self) -> Node:
        """The node as a caller sees it."""
        load = Load(current_connections=SLOTS - self.free, queue_length=len(self.listed))
        return Node(
            id=self.id, serves=frozenset({"llm"}), metadata={ZONE: self.zone}, load=load,
            capacity=Capacity(max_connections=SLOTS),
        )  # fmt: skip


class Caller:
    """Whoever sends jobs from one zone. Without a bound it knows no zones."""

    def __init__(self, zone: str, bound: float | None, rng: random.Random) -> None:
        self._zone, self._bound = zone, bound
        # The balancers of the caller's zone and of the others, as the router has them.
        self._balancers = {near: LeastConnection(rng) for near in (True, False)}
        self._read_s = -inf

    def choose(self, workers: dict[str, Worker], now_s: float) -> Worker:
        """The node that a job is placed on."""
        if now_s - self._read_s >= SNAPSHOT_S:
            self._read_s, self._nodes = now_s, tuple(worker.seen() for worker in workers.values())
            self._zones = Zones(self._nodes, self._zone, self._bound or inf)
            for balancer in self._balancers.values():
                balancer.update(self._nodes)
        near, among = True, self._nodes
        if self._bound is not None:
            near = self._zones.is_near()
            self._zones.count(near)
            among = self._zones.near if near else self._zones.far
        return workers[self._balancers[near].select(Request("llm"), among).id]


def simulate(bound: float | None, share: float, load: float, jobs: int) -> dict[str, float]:
    """Send jobs, ``share`` of them from the first zone, until all have ended; return what came of them."""
    # The same jobs for every bound, whatever is drawn to place them.
    drawn, rng = random.Random(1), random.Random(2)
    workers = {f"{zone}{number}": Worker(f"{zone}{number}", zone) for zone in ZONES for number in range(NODES)}
    callers = {zone: Caller(zone, bound, rng) for zone in ZONES}
    rate = load * len(workers) * SLOTS * sum(WEIGHTS) / sum(map(float.__mul__, DURATIONS_S, map(float, WEIGHTS)))
    events: list[tuple[float, int, Worker | Job]] = []
    order, at_s = count(), 0.0
    for _ in range(jobs):
        at_s += drawn.expovariate(rate)
        zone = ZONES[0] if drawn.random() < share else ZONES[1]
        heappush(events, (at_s, next(order), Job(zone, at_s, drawn.choices(DURATIONS_S, WEIGHTS)[0])))
    done: list[tuple[bool, float, float]] = []

    def run(worker: Worker, job: Job, now_s: float) -> None:
        worker.free -= 1
        end_s = now_s + job.lasts_s
        done.append((worker.zone == job.zone, now_s - job.sent_s, (end_s - job.sent_s) / job.lasts_s))
        heappush(events, (end_s, next(order), worker))

    while events:
        now_s, _, what = heappop(events)
        if isinstance(what, Worker):
            worker = what
            worker.free, worker.idle_since_s = worker.free + 1, now_s
            source = worker if worker.listed else max(workers.values(), key=lambda each: len(each.listed))
            if source.listed:
                run(worker, source.listed.popleft(), now_s)
            continue
        job = what
        target = callers[job.zone].choose(workers, now_s)
        if not target.free:
            idle = [each for each in workers.values() if each.free]
            near = target.zone
            taker = min(idle, key=lambda each: (each.zone != near, each.idle_since_s)) if idle else None
        else:
            taker = target
        if taker:
            run(taker, job, now_s)
        else:
            target.listed.append(job)
    kept, waits, slowdowns = zip(*done[jobs // 10 :], strict=True)
    return {IN_ZONE: 100 * mean(kept), WAIT: mean(waits), SLOWDOWN: percentile(slowdowns, 0.99)}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for callers that know no zones, and one for each bound beside it."""
    for sends, share in SHARES.items():
        without = simulate(None, share, options.load, options.jobs)
        yield Row(f"{sends} from one zone, no zones", without)
        for bound in BOUNDS:
            found = simulate(bound, share, options.load, options.jobs)
            yield Row(f"{sends} from one zone, bound {bound:g}", found, ratio=found[SLOWDOWN] / without[SLOWDOWN])


def main() -> int:
    benchmark = Benchmark("zones", __doc__)
    benchmark.option("--jobs", short=4_000, full=20_000, help="of each simulation")
    benchmark.option("--load", short=0.9, full=0.9, help="of all slots")
    benchmark.note("ratio: the p99 slowdown over that of callers that know no zones.")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
