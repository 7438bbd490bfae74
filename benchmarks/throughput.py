"""Jobs per second of one node against one stock worker: ``python -m benchmarks.throughput [--rounds 5] [--json]``.

One Redis, started here; for each pool, rounds in which the stock worker, the stock worker with ``task_acks_late`` (what
a node always does) and the node take turns, in the other direction every second round. In each turn the jobs, which do
nothing and whose results are stored, are published first; then a worker is started, and stopped when all have ended.
The apps differ in ``Cluster(app)`` and ``base=ClusterTask`` alone.

The clock is Celery's own: every stored result says in ``date_done`` when its job ended. Both sides write it anyway, and
it is read when all is over, so measuring costs the workers nothing; the start of a worker is not in the figure. Only
the ratios mean something on a machine that does other work: each is of one round, and their median counts.

Publishing is measured by itself, without workers: ``delay()`` with a node registered, so that the router has to choose.

Mark: 1.5 times the jobs per second of the stock worker, for every pool.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import redis

from benchmarks.noop import CLUSTER, REDIS_URL, REQUEST_TYPE, STOCK, STOCK_LATE, VARIANT, make_app
from cluster_tasks.cluster import cluster_of
from cluster_tasks.model import Capacity, Node
from cluster_tasks.redis_store import connect
from workers.redis_server import RedisServer
from workers.tether import tethered, tethering

MARK = 1.5
POOLS = ("prefork", "threads", "solo")
VARIANTS = (STOCK, STOCK_LATE, CLUSTER)
SLOTS = 2
NODE = "node1@benchmark"
JOB_S = 0.05
"""A job takes less: who waits longer for all of them waits for one that is lost."""
START_S = 60.0
STOP_S = 15.0
PUBLISH_BATCH = 500
HOME = Path(__file__).parents[1]


class Bench:
    """One Redis, and the workers that take turns on it."""

    def __init__(self, url: str, directory: Path, jobs: int) -> None:
        self._url, self._directory, self._jobs = url, directory, jobs
        self._client: redis.Redis = connect(url)
        self._apps = {variant: make_app(variant, url) for variant in VARIANTS}

    def jobs_per_s(self, pool: str, rounds: int) -> list[dict[str, float]]:
        """Return jobs per second by variant, for each round."""
        turns = [VARIANTS if number % 2 == 0 else VARIANTS[::-1] for number in range(rounds)]
        return [{variant: self._turn(variant, pool) for variant in turn} for turn in turns]

    def publishing_us(self, rounds: int) -> list[dict[str, float]]:
        """Return microseconds for each ``delay()`` by variant, for each round."""
        self._client.flushall()
        cluster = cluster_of(self._apps[CLUSTER])
        epoch = cluster.epochs.open(NODE, {REQUEST_TYPE})
        assert isinstance(epoch, str)
        capacity = Capacity(max_connections=SLOTS, max_threads=SLOTS)
        cluster.registry.register(Node(id=NODE, epoch=epoch, capacity=capacity, serves=frozenset({REQUEST_TYPE})))
        cluster.router  # noqa: B018 - made at the first publish; its view is read then
        self._publish(STOCK, PUBLISH_BATCH)
        self._publish(CLUSTER, PUBLISH_BATCH)
        taken = []
        for _ in range(rounds):
            row = {}
            for variant in (STOCK, CLUSTER):
                begin = time.perf_counter()
                self._publish(variant, PUBLISH_BATCH)
                row[variant] = (time.perf_counter() - begin) / PUBLISH_BATCH * 1e6
            taken.append(row)
        return taken

    def close(self) -> None:
        """Give up all connections."""
        for app in self._apps.values():
            app.close()
        self._client.close()

    def _turn(self, variant: str, pool: str) -> float:
        self._client.flushall()
        names = [f"celery-task-meta-{job}" for job in self._publish(variant, self._jobs)]
        with self._worker(variant, pool):
            self._wait_for(names)
        ended = sorted(_ended_at_s(result) for result in self._client.mget(names))
        return (len(ended) - 1) / (ended[-1] - ended[0])

    def _publish(self, variant: str, count: int) -> list[str]:
        app = self._apps[variant]
        noop = app.tasks["noop"]
        ids = [noop.delay().id for _ in range(count)]
        # What was subscribed to has been given up again, but nobody has read Redis' answers to that.
        app.backend.result_consumer.on_after_fork()
        return ids

    def _wait_for(self, names: list[str]) -> None:
        until_s = time.monotonic() + START_S + JOB_S * len(names)
        # One look at one key does not disturb the worker; all of them are looked at near the end only.
        while not self._client.exists(names[-1]) or self._client.exists(*names) < len(names):
            if time.monotonic() > until_s:
                logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in self._directory.glob("*.log"))
                raise TimeoutError(f"{self._client.exists(*names)} of {len(names)} jobs have ended\n{logs}")
            time.sleep(0.05)

    @contextmanager
    def _worker(self, variant: str, pool: str) -> Iterator[None]:
        """Run a worker; it ends with this process, however that ends."""
        command = [*(sys.executable, "-m", "celery", "-A", "benchmarks.noop", "worker", "-n", NODE, "-l", "WARNING")]
        command += ["-P", pool, "-c", str(SLOTS)]
        environ = {**tethering(), VARIANT: variant, REDIS_URL: self._url}
        with (self._directory / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                tethered(signal.SIGKILL, command), cwd=HOME, env=environ, stdout=log, stderr=log, start_new_session=True
            )
            try:
                yield
            finally:
                stop(worker)


def _ended_at_s(result: Any) -> float:
    meta: dict[str, Any] = json.loads(result)
    assert meta["status"] == "SUCCESS", meta
    return datetime.fromisoformat(meta["date_done"]).timestamp()


def stop(worker: subprocess.Popen[bytes]) -> None:
    """End a worker in order; what is left of it and its children after a while is killed."""
    try:
        family = psutil.Process(worker.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    worker.terminate()
    try:
        worker.wait(STOP_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    _, alive = psutil.wait_procs(family, timeout=STOP_S)
    for member in alive:
        member.kill()


def report(pool: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return what the rounds of a pool say."""
    ratio = median(row[CLUSTER] / row[STOCK] for row in rounds)
    return {
        "pool": pool,
        "stock_jobs_per_s": median(row[STOCK] for row in rounds),
        "stock_late_jobs_per_s": median(row[STOCK_LATE] for row in rounds),
        "cluster_jobs_per_s": median(row[CLUSTER] for row in rounds),
        "ratio": ratio,
        "ratio_to_late": median(row[CLUSTER] / row[STOCK_LATE] for row in rounds),
        "ratios": [row[CLUSTER] / row[STOCK] for row in rounds],
        "met": ratio >= MARK,
    }


def report_publishing(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return what publishing costs."""
    return {
        "stock_us": median(row[STOCK] for row in rounds),
        "cluster_us": median(row[CLUSTER] for row in rounds),
        "ratio": median(row[CLUSTER] / row[STOCK] for row in rounds),
    }


def show(result: dict[str, Any]) -> None:
    """Print it for people."""
    print(f"{result['jobs']} jobs that do nothing, {result['rounds']} rounds; mark: {MARK:g} times the stock worker")
    for row in result["pools"]:
        print(
            f"{row['pool']:>8}  stock {row['stock_jobs_per_s']:5.0f}/s  cluster {row['cluster_jobs_per_s']:5.0f}/s  "
            f"ratio {row['ratio']:.2f}  {'met' if row['met'] else 'missed'}   "
            f"(stock with acks_late {row['stock_late_jobs_per_s']:.0f}/s: {row['ratio_to_late']:.2f})"
        )
    row = result["publishing"]
    print(
        f"publishing  stock {row['stock_us']:.0f} µs  cluster {row['cluster_us']:.0f} µs  "
        f"ratio {row['ratio']:.2f} (less is better)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pool", action="append", choices=POOLS, help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Told to end, it ends in order: what it started and wrote goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for variable in [name for name in os.environ if name.startswith(("CLUSTER_", "CELERY_"))]:
        # Nothing of the caller's cluster may be in the figures, nor the benchmark in his cluster.
        del os.environ[variable]
    with TemporaryDirectory(prefix="throughput-") as name, RedisServer(Path(name)) as server:
        bench = Bench(server.url, Path(name), options.jobs)
        try:
            pools = [report(pool, bench.jobs_per_s(pool, options.rounds)) for pool in options.pool or POOLS]
            publishing = report_publishing(bench.publishing_us(max(options.rounds, 5)))
        finally:
            bench.close()
    result = {
        "jobs": options.jobs, "rounds": options.rounds, "mark": MARK, "met": all(row["met"] for row in pools),
        "pools": pools, "publishing": publishing,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
