"""How many nodes one Redis carries, and what they cost: ``python -m benchmarks.scale [--full] [--json]``.

*Real*: at each size so many worker processes and a coordinator join a cluster and have nothing to do for a while: what
they ask of Redis, and what each takes of this machine. At the largest size they are given jobs of a second, a tenth of
them gets a SIGKILL in the midst of it, all at once, and the others finish.

*Simulated*: what 1,000 and 10,000 idle nodes ask of Redis, see ``benchmarks.growth``. One processor is 100 %.

Marks: no job is lost; Redis' processor below 20 % at 1,000 idle nodes; nothing grows with the square of the nodes.
That has two: no kind of command that is often given comes more and more often with the real nodes (an exponent of 1.5
at most: 1 is a straight line, 2 a square, and a few sizes tell no more), and the cost of none has an exponent above 1.2
in the simulation (n log n has 1.1 to 1.2 at these sizes).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import redis

from benchmarks.commands import Identity, followed
from benchmarks.figures import exponent
from benchmarks.fleet import COORDINATOR, Client, Fleet, patient
from benchmarks.growth import Cost, Growth, Recording, Simulation, total
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.sleeping import CLUSTER
from benchmarks.stage import private_redis, wait_until
from cluster_tasks.cluster import cluster_of
from cluster_tasks.model import Node
from workers.redis_server import RedisServer

MARK_PERCENT = 20.0
MARK_NODES = 1_000
MARK_EXPONENT = 1.2
MARK_RATE_EXPONENT = 1.5
KILLED = 0.1
JOB_S = 1.0
JOBS = 5
"""Of each node."""
SETTLE_S = 6.0
"""What a node does once, as it joins, is over."""
SHOWN = 5
"""Of the kinds, those that cost most."""
WORTH = 0.001
"""Of a processor at the largest size: of what costs less the growth is noise."""
OVER_S = 300.0
KEPT_UP = 0.95
"""Of the health checks that there are among the fewest nodes."""


@dataclass(frozen=True, slots=True)
class Idle:
    """What real nodes cost that have nothing to do."""

    size: int
    joined_s: float
    commands_per_s: float
    redis_cpu: float
    """Share of one processor."""
    node_cpu: float
    """Share of one processor, of one node."""
    rss_mb: float
    """Of the main process of a node."""
    own_mb: float
    """What a node, with its pool, has for itself: what forks share is not in it."""
    connections: float
    """Of a node to Redis."""
    checks_per_s: float
    """Of the coordinator, while it was recorded what all said."""

    def row(self) -> Row:
        """Return it for the table."""
        return Row(
            f"{self.size} real nodes, idle",
            {
                "commands/s": self.commands_per_s,
                "Redis, % of a CPU": 100 * self.redis_cpu,
                "CPU of a node, %": 100 * self.node_cpu,
                "RSS of a node, MB": self.rss_mb,
                "own memory, MB": self.own_mb,
                "connections": self.connections,
                "joined after, s": self.joined_s,
                "checks/s": self.checks_per_s,
            },
        )


class Bench:
    """A cluster that grows."""

    def __init__(self, server: RedisServer, fleet: Fleet, client: Client) -> None:
        self._server, self._fleet, self._client = server, fleet, client
        self._cluster = cluster_of(client.app)
        self._redis: redis.Redis = patient(server.url)

    def grow(self, size: int) -> float:
        """Start as many nodes as are missing; return how many seconds it took until all consumed."""
        begun_s = time.monotonic()
        if COORDINATOR not in self._fleet.nodes:
            self._fleet.start_coordinator()
        self._fleet.start(f"n{number}@fleet" for number in range(self._size, size))
        self._fleet.wait_ready()
        wait_until(lambda: len(self._redis.hkeys(self._cluster.keys.nodes)) > size, OVER_S)
        return time.monotonic() - begun_s

    def idle(self, size: int, lasts_s: float) -> tuple[Idle, Recording]:
        """Let so many nodes be for a while, twice: for what they cost, and for what they say."""
        joined_s = self.grow(size)
        time.sleep(SETTLE_S)
        before, cpu_before, begun_s = self._used(), self._cpu_by_node(), time.monotonic()
        time.sleep(lasts_s)
        after, cpu_after, took_s = self._used(), self._cpu_by_node(), time.monotonic() - begun_s
        clients: Any = self._redis.info("clients")
        connections = clients["connected_clients"] / (size + 1)
        mains = [psutil.Process(self._fleet.pid(name)) for name in self._workers]
        sample = random.Random(size).sample(mains, min(len(mains), 10))
        own = [sum(each.memory_full_info().uss for each in (main, *main.children(recursive=True))) for main in sample]
        # Apart, for to be followed costs Redis as much again.
        checked, begun_s = self._cluster.checks_done(), time.monotonic()
        with followed(self._server.url) as commands:
            time.sleep(lasts_s)
        lasted_s = time.monotonic() - begun_s
        cost = Idle(
            size,
            joined_s,
            (after[0] - before[0]) / took_s,
            (after[1] - before[1]) / took_s,
            statistics.mean(cpu_after[name] - cpu_before[name] for name in self._workers) / took_s,
            statistics.mean(main.memory_info().rss for main in sample) / 2**20,
            statistics.mean(own) / 2**20,
            connections,
            (self._cluster.checks_done() - checked) / lasted_s,
        )
        epochs = {name: beat.epoch for name, beat in self._cluster.epochs.beats().items()}
        nodes = [Identity(name, epochs[name]) for name in self._workers]
        return cost, Recording(nodes, commands, lasted_s)

    def coordinator(self) -> Identity:
        """Who speaks beside the nodes."""
        return Identity(COORDINATOR, self._cluster.epochs.beats()[COORDINATOR].epoch)

    def sample(self) -> Node:
        """A node as one registers itself."""
        return next(node for node in self._cluster.nodes() if node.id in self._workers)

    def work(self) -> Row:
        """Give all nodes jobs, kill some of them at once, and wait for the others to finish."""
        size = self._size
        begun_s = time.monotonic()
        jobs = [self._client.send(JOB_S) for _ in range(JOBS * size)]
        time.sleep(JOB_S / 2)
        victims = random.Random(size).sample(self._workers, max(1, int(size * KILLED)))
        self._fleet.kill(*victims)
        # What has not ended by then is lost, and the table says so.
        with suppress(TimeoutError):
            wait_until(lambda: self._client.ended(jobs) == len(jobs), OVER_S, every_s=0.2)
        took_s = time.monotonic() - begun_s
        done = self._client.done(jobs)
        return Row(
            f"{size} real nodes, {len(victims)} killed at once at work",
            {
                "jobs": len(jobs),
                "lost": len(jobs) - len(done),
                "took, s": took_s,
                "no kill would take, s": JOBS * JOB_S,
            },
            mark=Mark(of="lost", at_most=0),
        )

    def close(self) -> None:
        """Give up the connection."""
        self._redis.close()

    @property
    def _workers(self) -> list[str]:
        return [name for name in self._fleet.nodes if name != COORDINATOR]

    @property
    def _size(self) -> int:
        return len(self._workers)

    def _used(self) -> tuple[int, float]:
        """Commands that Redis has done, and seconds of processor that it has used."""
        told: Any = self._redis.info()
        return told["total_commands_processed"], told["used_cpu_user"] + told["used_cpu_sys"]

    def _cpu_by_node(self) -> dict[str, float]:
        used = {}
        for name in self._workers:
            main = psutil.Process(self._fleet.pid(name))
            times = [each.cpu_times() for each in (main, *main.children(recursive=True))]
            used[name] = sum(each.user + each.system for each in times)
        return used


def those_that_kept_up(looked: Sequence[tuple[Idle, Recording]]) -> Sequence[tuple[Idle, Recording]]:
    """Leave out the sizes at which this machine was too busy for the coordinator, so that nodes did its work as well.

    Two sizes are left whatever the machine does.
    """
    rate = looked[0][0].checks_per_s
    return [each for place, each in enumerate(looked) if place < 2 or each[0].checks_per_s >= KEPT_UP * rate]


def simulate(server: RedisServer, growth: Growth, sample: Node, sizes: Sequence[int]) -> dict[int, Mapping[str, Cost]]:
    """Return what each kind of command costs, by size, on a Redis whose nodes are gone."""
    with Client(server.url, CLUSTER) as client, patient(server.url) as connection:
        simulation = Simulation(connection, cluster_of(client.app), sample)
        return {size: simulation.costs(growth, size) for size in sizes}


def exponents(costs: Mapping[int, Mapping[str, Cost]]) -> dict[str, float]:
    """How the cost of each kind grows with the nodes, of those that are worth it."""
    largest = costs[max(costs)]
    found = {}
    for name in (name for name, cost in largest.items() if cost.share > WORTH):
        shares = {size: by_kind[name].share for size, by_kind in costs.items() if name in by_kind}
        if len(shares) > 1:
            found[name] = exponent(list(shares), list(shares.values()))
    return found


def rate_row(growth: Growth) -> Row:
    """Return how much more often commands come with the real nodes, those of the kind for which that is worst."""
    found = growth.rate_exponents()
    steepest = max(found, key=lambda name: found[name])
    return Row(
        f"real nodes, more and more often: {steepest}", {"exponent": found[steepest]},
        mark=Mark(of="exponent", at_most=MARK_RATE_EXPONENT),
    )  # fmt: skip


def simulated_rows(costs: Mapping[int, Mapping[str, Cost]], real: Idle) -> Iterator[Row]:
    """Return what the simulation says."""
    worst = {size: max(by_kind, key=lambda name: by_kind[name].share) for size, by_kind in costs.items()}
    for size, by_kind in costs.items():
        every = total(by_kind)
        share = 100 * every.share
        figures = {"commands/s": every.per_s, "Redis, % of a CPU": share}
        yield Row(
            f"{size:,} simulated nodes, idle", figures,
            # Of the size that is real as well, what was measured of it.
            ratio=every.share / real.redis_cpu if size == real.size else None,
            mark=Mark(of="Redis, % of a CPU", below=MARK_PERCENT) if size == MARK_NODES else None,
            reason=f"most goes to {worst[size]}: {100 * by_kind[worst[size]].share:.0f} %",
        )  # fmt: skip
    grows = exponents(costs)
    largest = costs[max(costs)]
    for name in sorted(grows, key=lambda name: -largest[name].share)[:SHOWN]:
        cost = largest[name]
        figures = {
            "commands/s": cost.per_s, "Redis, % of a CPU": 100 * cost.share, "µs each": cost.cpu_us,
            "exponent": grows[name],
        }  # fmt: skip
        yield Row(f"of {max(costs):,}: {name}", figures)
    steepest = max(grows, key=lambda name: grows[name])
    yield Row(
        f"steepest growth: {steepest}", {"exponent": grows[steepest]}, mark=Mark(of="exponent", at_most=MARK_EXPONENT),
        reason=f"{largest[steepest].per_s:,.0f} of them a second cost {largest[steepest].cpu_us:,.0f} µs each",
    )  # fmt: skip
    sizes = list(costs)
    yield Row("growth of all", {"exponent": exponent(sizes, [total(costs[size]).share for size in sizes])})


benchmark = Benchmark("scale", __doc__)
benchmark.option("--nodes", short=[12, 30], full=[25, 50, 100], nargs="+", type=int, help="sizes of the real cluster")
benchmark.option(
    "--simulated", short=[1_000, 3_000], full=[100, 300, 1_000, 3_000, 10_000], nargs="+", type=int, help="sizes"
)
benchmark.option("--lasts-s", short=3.0, full=20.0, help="seconds that the nodes are looked at, twice at each size")
benchmark.note("A ratio is that of what was simulated to what was measured at the same size.")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    looked = []
    with private_redis() as server:
        with Fleet(server, CLUSTER) as fleet, Client(server.url, CLUSTER) as client:
            bench = Bench(server, fleet, client)
            try:
                for size in sorted(options.nodes):
                    looked.append(bench.idle(size, options.lasts_s))
                    yield looked[-1][0].row()
                coordinator, sample = bench.coordinator(), bench.sample()
                yield bench.work()
            finally:
                bench.close()
        kept_up = those_that_kept_up(looked)
        growth, real = Growth([recording for _, recording in kept_up], [coordinator]), kept_up[-1][0]
        yield rate_row(growth)
        sizes = sorted({real.size, *options.simulated})
        yield from simulated_rows(simulate(server, growth, sample, sizes), real)


if __name__ == "__main__":
    sys.exit(benchmark.run(measure))
