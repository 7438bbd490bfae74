"""Jobs per second, beside stock Celery and six other queues: ``python -m benchmarks.throughput [--full] [--json]``.

Jobs that do nothing, on one Redis that is started here; for each pool, with results and without, with one worker and
with two, rounds in which all take turns, in the other direction every second round. In a turn the jobs are published
first; then workers are started, and stopped when all have run. Each worker has two slots: two processes (``prefork``),
one process with two threads (``threads``), or one that runs one job after the other (``solo``). Peers that run
coroutines have as many as they like in one process, which is compared with ``threads``, or in two, with ``prefork``.

The clock is a note of 12 bytes that the job itself appends to a file, the same for all (``benchmarks.peers.job``): it
costs nobody a round trip. The rate is that between the first and the last note; with several processes, of the time in
which all of them were at work. The start of a process is not in it. Only the ratios mean something on a machine that
does other work: each is of one round, and their median counts.

The stock worker is without gossip, mingle and heartbeats and fetches 64 jobs a slot ahead, as Celery's guide advises
for short jobs. The mark compares with its late acks, which is the promise that comes nearest; early ones are in the
table. How each peer is set up says its file in ``benchmarks/peers``. Each has an environment of its own, made with pip
when it is first measured.

Marks: 3 times the stock worker, and ahead of every peer that runs the jobs of a dead worker again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import redis
from celery import Celery

from benchmarks import noop
from benchmarks.figures import in_turn
from benchmarks.noop import CLUSTER, STOCK, STOCK_LATE, VARIANT
from benchmarks.peers import job
from benchmarks.peers.contestants import PEERS, PREFORK, THREADS, Peer
from benchmarks.peers.environments import environment
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.stage import Worker, celery_worker, private_redis, wait_until
from cluster_tasks.redis_store import connect

STOCK_MARK, PEER_MARK = 3.0, 1.0
WHY_NOT_STOCK = (
    "a job is two round trips, fetch and fenced commit: sockets take more of its time than any package does "
    "(benchmarks.profiling, solo)"
)
SOLO = "solo"
POOLS = (PREFORK, THREADS, SOLO)
SLOTS = {PREFORK: 2, THREADS: 2, SOLO: 1}
PROCESSES = {PREFORK: 2, THREADS: 1, SOLO: 1}
"""Of a worker, that run jobs."""
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")
BESIDE = Path(__file__).with_name("peers")
"""Where the apps of the peers are imported from."""
JOB_S = 0.05
"""A job takes less: who waits longer for all of them waits for one that is lost."""
START_S, STORED_S = 300.0, 10.0
LEAST_SHARE = 0.2
"""Of the jobs, that have to run while all processes are at work."""


class Apps(Protocol):
    """A module whose app ``celery -A`` takes, by the variables that it reads."""

    __name__: str

    def make_app(self, variant: str, url: str, results: bool) -> Celery:
        """Return the same app for this process."""


class Bench:
    """One Redis, and the workers that take turns on it."""

    def __init__(self, url: str, directory: Path, jobs: int) -> None:
        self._url, self._directory, self._jobs = url, directory, jobs
        self._client: redis.Redis = connect(url)
        self._turns = count()

    def celery(
        self, variant: str, pool: str, workers: int, results: bool, apps: Apps = noop, more: Mapping[str, str] = {},
    ) -> float:  # fmt: skip
        """Return jobs per second of a turn of stock Celery or of the cluster.

        ``more`` are further variables of the workers.
        """
        self._client.flushall()
        app = apps.make_app(variant, self._url, results)
        sent = [app.tasks["noop"].delay() for _ in range(self._jobs)]
        if results:
            # What was subscribed to has been given up again, but nobody has read Redis' answers to that.
            app.backend.result_consumer.on_after_fork()
        names = [f"celery-task-meta-{each.id}" for each in sent]
        del sent
        app.close()
        environ = {**more, VARIANT: variant, job.REDIS_URL: self._url, job.RESULTS: str(int(results))}
        extra = QUIET if variant in {STOCK, STOCK_LATE} else ()
        log, ends = self._files()
        processes = [
            celery_worker(
                apps.__name__, f"node{number}@benchmark", pool, SLOTS[pool], log,
                {**environ, job.ENDS: str(ends)}, extra,
            )
            for number in range(workers)
        ]  # fmt: skip
        rate = self._rate(processes, ends, workers * PROCESSES[pool])
        stored = self._client.exists(*names)
        if stored != self._jobs * results:
            raise RuntimeError(f"{variant}: {stored} of {self._jobs} results were stored")
        return rate

    def peer(self, peer: Peer, pool: str, workers: int, results: bool) -> float:
        """Return jobs per second of a turn of a peer."""
        self._client.flushall()
        programs = environment(peer.name, peer.requirements) / "bin"
        environ = {
            **peer.environ, job.REDIS_URL: self._url, job.RESULTS: str(int(results)),
            "RQ_REDIS_URL": self._url, "PYTHONPATH": str(BESIDE), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        publish = [str(programs / "python"), str(BESIDE / f"{peer.app}.py"), str(self._jobs)]
        subprocess.run(publish, env={**os.environ, **environ}, check=True, stdin=subprocess.DEVNULL)
        log, ends = self._files()
        processes = [
            Worker([str(programs / words[0]), *words[1:]], log, {**environ, job.ENDS: str(ends)})
            for _ in range(workers)
            for words in peer.workers[pool]
        ]
        wanted = self._jobs * results

        def stored() -> int:
            # Of some the keys tell nothing.
            return sum(1 for _ in self._client.scan_iter(f"{peer.results}*", count=1000)) if peer.results else wanted

        rate = self._rate(processes, ends, workers * PROCESSES[pool], lambda: stored() == wanted)
        if stored() != wanted:
            raise RuntimeError(f"{peer.name}: {stored()} of {self._jobs} results were stored")
        return rate

    def close(self) -> None:
        """Give up all connections."""
        self._client.close()

    def _files(self) -> tuple[Path, Path]:
        turn = next(self._turns)
        return self._directory / f"turn{turn}.log", self._directory / f"turn{turn}.ends"

    def _rate(
        self, workers: Sequence[Worker], ends: Path, processes: int, are_stored: Callable[[], bool] = lambda: True
    ) -> float:
        size = job.NOTE.size * self._jobs
        with ExitStack() as stack:
            for worker in workers:
                stack.enter_context(worker)
            within_s = START_S + JOB_S * self._jobs
            wait_until(lambda: ends.exists() and ends.stat().st_size >= size, within_s, workers)
            # A worker that is stopped drops coroutines that have run and whose results are still to be stored.
            with suppress(TimeoutError):
                wait_until(are_stored, STORED_S, workers)
        return jobs_per_s(list(job.NOTE.iter_unpack(ends.read_bytes())), processes)


def jobs_per_s(notes: Sequence[tuple[float, int]], processes: int) -> float:
    """Return the rate of the time in which all processes were at work. Raises RuntimeError if that was too short.

    A note is the time in seconds and the id of the process.
    """
    times: dict[int, list[float]] = {}
    for at_s, process in notes:
        times.setdefault(process, []).append(at_s)
    if len(times) < processes:
        raise RuntimeError(f"{len(times)} of {processes} processes ran jobs: give more --jobs")
    begun_s, ended_s = max(map(min, times.values())), min(map(max, times.values()))
    within = sum(begun_s <= at_s <= ended_s for at_s, _ in notes)
    if ended_s <= begun_s or within < LEAST_SHARE * len(notes):
        raise RuntimeError(f"all processes were at work for {within} of {len(notes)} jobs: give more --jobs")
    return (within - 1) / (ended_s - begun_s)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each pool, and one for each peer beside it."""
    # First of all: who cannot be installed is found out before others are measured for minutes.
    for peer in PEERS:
        if peer.name in options.peers:
            environment(peer.name, peer.requirements)
    with private_redis() as server:
        bench = Bench(server.url, server.directory, options.jobs)
        try:
            for results in options.results:
                for workers in options.workers:
                    for pool in options.pools:
                        yield from compare(bench, pool, workers, results, options)
        finally:
            bench.close()


def compare(bench: Bench, pool: str, workers: int, results: bool, options: argparse.Namespace) -> Iterator[Row]:
    """Let all that have such a pool take turns."""
    turns: dict[str, Any] = {
        variant: lambda variant=variant: bench.celery(variant, pool, workers, results)
        for variant in (STOCK, STOCK_LATE, CLUSTER)
    }
    peers = [peer for peer in PEERS if pool in peer.workers and peer.name in options.peers]
    turns |= {peer.name: lambda peer=peer: bench.peer(peer, pool, workers, results) for peer in peers}
    rounds = [{name: turns[name]() for name in in_turn(turns, number)} for number in range(options.rounds)]
    where = f"{pool}, {workers} worker{'s' * (workers > 1)}, {'results' if results else 'no results'}"
    yield stock_row(where, rounds)
    for peer in peers:
        yield peer_row(where, peer, rounds)


def stock_row(where: str, rounds: Sequence[Mapping[str, float]]) -> Row:
    """Return what the rounds say of stock Celery."""
    figures = {"cluster, jobs/s": median(row[CLUSTER] for row in rounds)}
    figures |= {
        "other, jobs/s": median(row[STOCK_LATE] for row in rounds),
        "with early acks, jobs/s": median(row[STOCK] for row in rounds),
        "ratio to early acks": median(row[CLUSTER] / row[STOCK] for row in rounds),
    }
    return Row(
        f"stock Celery, {where}",
        {**figures, "a job whose worker died": "runs again after an hour, or never"},
        ratio=median(row[CLUSTER] / row[STOCK_LATE] for row in rounds),
        mark=Mark(at_least=STOCK_MARK),
        reason=WHY_NOT_STOCK,
    )


def peer_row(where: str, peer: Peer, rounds: Sequence[Mapping[str, float]]) -> Row:
    """Return what the rounds say of a peer; there is a mark only if it gives the same promise."""
    stock = median(row[STOCK] / row[peer.name] for row in rounds)
    return Row(
        f"{peer.name} {peer.version}, {where}",
        {
            "cluster, jobs/s": median(row[CLUSTER] for row in rounds),
            "other, jobs/s": median(row[peer.name] for row in rounds),
            "a job whose worker died": peer.guarantee,
        },
        ratio=median(row[CLUSTER] / row[peer.name] for row in rounds),
        mark=Mark(at_least=PEER_MARK) if peer.reruns else None,
        reason=f"it does without Celery's machinery: stock Celery with early acks does {stock:.2f} times as many",
    )


def main() -> int:
    benchmark = Benchmark("throughput", __doc__)
    benchmark.option("--jobs", short=800, full=3_000, help="jobs of each turn")
    benchmark.option("--rounds", short=1, full=2, help="rounds of each row")
    benchmark.option("--workers", short=[1], full=[1, 2], type=int, nargs="+", help="how many work together")
    benchmark.option("--results", short=[True], full=[True, False], type=_yes, nargs="+", help="yes, no or both")
    benchmark.option("--pools", short=[PREFORK], full=[*POOLS], type=str, nargs="+", choices=POOLS, help="which ones")
    names = [peer.name for peer in PEERS]
    benchmark.option("--peers", short=names, full=names, type=str, nargs="*", choices=names, help="just these")
    benchmark.note("ratio: jobs/s of the cluster over those of the other, median of the rounds.")
    return benchmark.run(measure)


def _yes(word: str) -> bool:
    if word not in {"yes", "no"}:
        raise argparse.ArgumentTypeError(f"expected yes or no, not {word!r}")
    return word == "yes"


if __name__ == "__main__":
    sys.exit(main())
