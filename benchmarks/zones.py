"""What staying in a datacentre costs, by ``zone_bound``: ``python -m benchmarks.zones [--jobs 20000] [--load 0.9]``.

A simulation in which only time is made up: placing is done by the project's own zones and ``least_connection``, each
caller with a view of its own that is up to 0.25 s old; nodes take from the longest list when they have nothing to do,
and an idle node is rung as the broker does it. Two zones of eight nodes with four slots; jobs take 0.1, 1 or 10 s. The
callers of one zone send half of all jobs, or four fifths. Told are the share of the jobs that were run in the zone of
their caller, the mean wait, and the 99th percentile of slowdown: the time from sending to end, by the time of the job.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from statistics import mean, quantiles

from cluster_tasks.balancing import LeastConnection
from cluster_tasks.balancing.zones import Zones
from cluster_tasks.model import ZONE, Capacity, Load, Node, Request

ZONES, NODES, SLOTS = "ab", 8, 4
SNAPSHOT_S = 0.25
DURATIONS_S, WEIGHTS = (0.1, 1.0, 10.0), (60, 30, 10)
BOUNDS = (1.0, 1.1, 1.25, 1.5, 2.0, inf)


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


def simulate(bound: float | None, share: float, load: float, jobs: int) -> dict[str, float | str]:
    """Send jobs, ``share`` of them from the first zone, until all have ended."""
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
    return {
        "bound": "no zones" if bound is None else f"{bound:g}", "share": share, "in_zone": mean(kept),
        "wait_s": mean(waits), "p99_slowdown": quantiles(slowdowns, n=100)[98],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--load", type=float, default=0.9, help="of all slots")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = [(bound, share) for share in (0.5, 0.8) for bound in (None, *BOUNDS)]
    rows = [simulate(bound, share, options.load, options.jobs) for bound, share in cases]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{options.jobs} jobs at {options.load:.0%} load")
    for row in rows:
        print(
            f"{row['share']:4.0%} from one zone, bound {row['bound']:>8}  {row['in_zone']:4.0%} run in their zone"
            f"  mean wait {row['wait_s']:6.2f} s  p99 slowdown {row['p99_slowdown']:6.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
