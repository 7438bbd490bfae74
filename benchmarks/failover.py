"""How soon the work of a killed node is in other hands: ``python -m benchmarks.failover [--full] [--json]``.

One Redis, a coordinator and, for each size of cluster, nodes that are half busy with jobs of two seconds, all settings
at their defaults. Again and again some nodes, fewer than half, get a SIGKILL at a random instant, and others take their
place. Of each kill is told, in seconds after it:

- *detected*: the node was fenced, as its event says;
- *re-owned*: all that it had held and listed waits for living nodes, as the next event says;
- *at work again*: the last job that it had held has begun anew, elsewhere, as its result says;
- *closed*: Redis has dropped the last connection of its main process. Nobody acts on that today. A cluster that did
  would see crashes so soon, and would own their work after *closed* and the time from *detected* to *re-owned*: the
  column *crash-only*. It would not see a machine that loses its power or its network, for which the lease is.

Mark: re-owned within 5 s, 99 of 100 times, whatever the size.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import psutil
import redis

from benchmarks.figures import percentile
from benchmarks.fleet import COORDINATOR, Client, Fleet, Steady, patient
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.sleeping import CLUSTER
from benchmarks.stage import private_redis, wait_until
from cluster_tasks import Cluster
from cluster_tasks.broker.message import job_of
from cluster_tasks.cluster import cluster_of
from workers.redis_server import RedisServer

JOB_S = 2.0
BUSY = 0.5
"""Share of the slots that the load fills."""
MARK_S = 5.0
AT_ONCE = 0.1
"""Of the nodes are killed together."""
LOOK_EVERY_S = 0.005
SETTLED_S = 1.0
"""Kills are at least so far apart, and at most twice."""
OVER_S = 60.0
UNLUCKY = {"CLUSTER_MAX_CRASH_DELIVERIES": "1000"}
"""Among few nodes some job meets three kills, and is not to be taken for what kills them."""


@dataclass(frozen=True, slots=True)
class Failover:
    """What came of one kill, in seconds after it."""

    detected_s: float
    reowned_s: float
    closed_s: float
    again_s: float | None
    """None: it had held nothing, or only what met another kill."""

    @property
    def crash_only_s(self) -> float:
        """When its work could be owned if the closed connection were acted on."""
        return self.closed_s + self.reowned_s - self.detected_s


@dataclass(frozen=True, slots=True)
class Kill:
    """A node, and what it had when it was killed."""

    node: str
    epoch: str
    at: float
    """Seconds since 1970."""
    held: frozenset[str]
    """Ids of its jobs."""
    ports: frozenset[str]
    """The ends of its connections, as Redis names them."""


class Bench:
    """One cluster under load, whose nodes are killed."""

    def __init__(self, server: RedisServer, fleet: Fleet, client: Client, rng: random.Random) -> None:
        self._server, self._fleet, self._client, self._rng = server, fleet, client, rng
        self._cluster: Cluster = cluster_of(client.app)
        self._redis: redis.Redis = patient(server.url)
        self._named = 0

    def run(self, nodes: int, kills: int) -> list[Failover]:
        """Kill so many of so many nodes; return what came of it."""
        self._fleet.start_coordinator()
        self._add(nodes)
        self._fleet.wait_ready()
        done: list[Kill] = []
        closed: dict[str, float] = {}
        with Steady(self._client, nodes * BUSY / JOB_S, JOB_S, self._rng) as load:
            time.sleep(JOB_S)
            while len(done) < kills:
                new = self._strike(min(max(1, int(nodes * AT_ONCE)), kills - len(done)))
                closed |= self._watch_closing(new)
                wait_until(lambda new=new: self._told(new), OVER_S)
                self._add(len(new))
                self._fleet.wait_ready()
                done += new
                time.sleep(self._rng.uniform(SETTLED_S, 2 * SETTLED_S))
        wait_until(lambda: self._client.ended(load.jobs) == len(load.jobs), OVER_S)
        begun = {job.sent.job_id: job.begun for job in self._client.done(load.jobs)}
        return [self._came_of(kill, closed[kill.epoch], again_s(kill, done, begun)) for kill in done]

    def close(self) -> None:
        """Give up all connections."""
        self._redis.close()

    def _add(self, count: int) -> None:
        self._fleet.start(f"n{number}@fleet" for number in range(self._named, self._named + count))
        self._named += count

    def _strike(self, count: int) -> list[Kill]:
        keys, redis_port = self._cluster.keys, self._server.port
        beats = self._cluster.epochs.beats()
        nodes = self._rng.sample([name for name in self._fleet.nodes if name in beats and name != COORDINATOR], count)
        ports = {node: _ports(self._fleet.pid(node), redis_port) for node in nodes}
        at = self._fleet.kill(*nodes)
        struck = []
        for node in nodes:
            epoch = beats[node].epoch
            messages: Any = self._redis.hvals(keys.unacked(node, epoch))
            struck.append(Kill(node, epoch, at, frozenset(map(job_of, messages)), ports[node]))
        return struck

    def _watch_closing(self, kills: Sequence[Kill]) -> dict[str, float]:
        """Return when Redis had dropped all connections of each, in seconds after its kill, by epoch."""
        closed: dict[str, float] = {}
        until_s = time.monotonic() + OVER_S
        while len(closed) < len(kills) and time.monotonic() < until_s:
            open_ports = {client["addr"].rpartition(":")[2] for client in self._redis.client_list()}
            now = time.time()
            for kill in kills:
                if kill.epoch not in closed and not kill.ports & open_ports:
                    closed[kill.epoch] = now - kill.at
            time.sleep(LOOK_EVERY_S)
        return closed

    def _told(self, kills: Sequence[Kill]) -> bool:
        return {kill.epoch for kill in kills} <= self._when("jobs moved").keys()

    def _when(self, kind: str) -> dict[str, float]:
        events = self._cluster.events.latest(10_000)
        return {event.facts["epoch"]: event.timestamp for event in events if event.kind == kind}

    def _came_of(self, kill: Kill, closed_s: float, again: float | None) -> Failover:
        return Failover(
            self._when("node lost")[kill.epoch] - kill.at,
            self._when("jobs moved")[kill.epoch] - kill.at,
            closed_s,
            again,
        )


def again_s(kill: Kill, kills: Sequence[Kill], begun: Mapping[str, float]) -> float | None:
    """Return after how many seconds the last job of a killed node began anew.

    ``begun`` says when each began for the last time: of one that met a later kill it does not say what this one cost.
    """
    struck_again = frozenset(chain.from_iterable(later.held for later in kills if later.at > kill.at))
    began_anew = (begun[job] - kill.at for job in kill.held - struck_again)
    return max((seconds for seconds in began_anew if seconds > 0), default=None)


def _ports(pid: int, redis_port: int) -> frozenset[str]:
    """The near ends of the connections of a process to Redis."""
    connections = psutil.Process(pid).net_connections("tcp")
    return frozenset(str(each.laddr.port) for each in connections if each.raddr and each.raddr.port == redis_port)


def rows(nodes: int, failovers: Sequence[Failover]) -> Iterator[Row]:
    """Return what the kills among so many nodes say."""
    columns = {
        "detected": [each.detected_s for each in failovers],
        "re-owned": [each.reowned_s for each in failovers],
        "at work again": [each.again_s for each in failovers if each.again_s is not None],
        "closed": [each.closed_s for each in failovers],
        "crash-only": [each.crash_only_s for each in failovers],
    }
    late = percentile(columns["detected"], 0.99)
    moving = percentile([each.reowned_s - each.detected_s for each in failovers], 0.99)
    for name, values in columns.items():
        if values:
            figures = {"kills": len(values), "p50, s": percentile(values, 0.5), "p99, s": percentile(values, 0.99)}
            mark = Mark(of="p99, s", at_most=MARK_S) if name == "re-owned" else None
            reason = f"until it was fenced {late:.1f} s, to move its jobs then {moving:.1f} s (p99 of each)"
            yield Row(f"{nodes} nodes, {name}", figures, mark=mark, reason=reason)


benchmark = Benchmark("failover", __doc__)
benchmark.option("--nodes", short=[3, 30], full=[3, 30, 100], nargs="+", type=int, help="sizes of the cluster")
benchmark.option("--kills", short=3, full=100, help="of each size")
benchmark.option("--seed", short=1, full=1, help="of what is left to chance")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for nodes in options.nodes:
        with (
            private_redis() as server,
            Fleet(server, CLUSTER, environ=UNLUCKY) as fleet,
            Client(server.url, CLUSTER) as client,
        ):
            bench = Bench(server, fleet, client, random.Random(options.seed))
            try:
                yield from rows(nodes, bench.run(nodes, options.kills))
            finally:
                bench.close()


if __name__ == "__main__":
    sys.exit(benchmark.run(measure))
