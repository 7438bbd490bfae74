"""Embedding requests per second, end to end, one by one and many in a message: ``python -m benchmarks.batching``.

One Redis and one node, both started here, with the provider ``local-hash``; each request is a job with a short text, an
id and a result of its own. In each round the same process sends requests by ``delay()`` and reads
all their results, and then by ``cluster.submit`` and ``get()``. The time is that from the first call to the last result
read, as lists of numbers; the node has been at work before.

Producer, node and Redis share the machine, and what they use of its processors is told for each request: on a machine
that does other work that says more than the time, and the ratio more than both. Medians of the rounds count.

Mark: 10,000 requests a second by ``submit``, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from celery import Celery

from benchmarks.throughput import stop
from cluster_tasks import Cluster
from cluster_tasks.tasks import embedding
from workers.redis_server import RedisServer
from workers.tether import tethered, tethering

MARK = 10_000
POOLS = ("prefork", "threads", "solo")
NODE = "node1@benchmark"
START_S, END_S = 60.0, 300.0
HOME = Path(__file__).parents[1]


class Bench:
    """One node, and who asks it for vectors."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url, self._directory, self._asked = url, directory, 0
        self._app = Celery("embedding", broker=url, backend=url, set_as_current=False)
        self._cluster = Cluster(self._app)
        self._embed = self._app.tasks[embedding.EMBED]

    def rounds(self, pool: str, slots: int, rounds: int, alone: int, together: int) -> list[dict[str, float]]:
        """Return requests per second, and microseconds of processors for each, of so many requests in each round."""
        with self._node(pool, slots) as node:
            self._submit(1000)
            self._delay(10)
            turns: list[dict[str, float]] = []
            for number in range(rounds):
                ways = [("delay", self._delay, alone), ("submit", self._submit, together)]
                row: dict[str, float] = {}
                for name, way, count in ways if number % 2 == 0 else reversed(ways):
                    row[name], row[f"{name}_cpu_us"] = self._measure(way, count, node)
                turns.append(row)
            return turns

    def close(self) -> None:
        """Give up all connections."""
        self._app.close()

    def _measure(self, way: Callable[[int], None], count: int, node: psutil.Process) -> tuple[float, float]:
        used_s, begun_s = self._used_s(node), time.perf_counter()
        way(count)
        took_s = time.perf_counter() - begun_s
        return count / took_s, (self._used_s(node) - used_s) / count * 1e6

    def _used_s(self, node: psutil.Process) -> float:
        """Seconds of processors that all three have used so far."""
        times = [process.cpu_times() for process in (psutil.Process(), node, *node.children(recursive=True))]
        server: Any = self._cluster.client.info("cpu")
        used_by_server = server["used_cpu_user"] + server["used_cpu_sys"]
        return float(sum(each.user + each.system for each in times) + used_by_server)

    def _delay(self, count: int) -> None:
        results = [self._embed.delay(text) for text in self._texts(count)]
        _check([result.get(timeout=END_S) for result in results])

    def _submit(self, count: int) -> None:
        _check(self._cluster.submit(self._embed, self._texts(count)).get(timeout=END_S))

    def _texts(self, count: int) -> list[str]:
        self._asked += count
        return [f"what do we know about subject {number}?" for number in range(self._asked - count, self._asked)]

    @contextmanager
    def _node(self, pool: str, slots: int) -> Iterator[psutil.Process]:
        """Run a node; it ends with this process, however that ends."""
        command = [*(sys.executable, "-m", "celery", "-A", "cluster_tasks", "worker", "-n", NODE, "-l", "WARNING")]
        command += ["-P", pool, "-c", str(slots)]
        environ = {**tethering(), "CLUSTER_BROKER_URL": self._url, "CLUSTER_DATA_DIR": str(self._directory / "data")}
        with (self._directory / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                tethered(signal.SIGKILL, command), cwd=HOME, env=environ, stdout=log, stderr=log, start_new_session=True
            )
            try:
                until_s = time.monotonic() + START_S
                while not self._cluster.nodes():
                    if time.monotonic() > until_s:
                        raise TimeoutError((self._directory / "worker.log").read_text(errors="replace")[-2000:])
                    time.sleep(0.05)
                yield psutil.Process(worker.pid)
            finally:
                stop(worker)


def _check(results: list[Any]) -> None:
    assert all(len(result["vectors"][0]) == result["dimension"] for result in results)


def report(pool: str, slots: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return what the rounds of a pool say."""
    by_submit = median(row["submit"] for row in rounds)
    return {
        "pool": pool,
        "slots": slots,
        "delay_per_s": median(row["delay"] for row in rounds),
        "submit_per_s": by_submit,
        "delay_cpu_us": median(row["delay_cpu_us"] for row in rounds),
        "submit_cpu_us": median(row["submit_cpu_us"] for row in rounds),
        "ratio": median(row["submit"] / row["delay"] for row in rounds),
        "ratios": [row["submit"] / row["delay"] for row in rounds],
        "met": by_submit >= MARK,
    }


def show(result: dict[str, Any]) -> None:
    """Print it for people."""
    print(f"embedding requests, {result['rounds']} rounds; mark: {MARK} a second by submit, on two cores")
    for row in result["pools"]:
        print(
            f"{row['pool']:>8} -c {row['slots']}  "
            f"delay {row['delay_per_s']:5.0f}/s ({row['delay_cpu_us']:.0f} µs each)  "
            f"submit {row['submit_per_s']:6.0f}/s ({row['submit_cpu_us']:.0f} µs)  "
            f"ratio {row['ratio']:.1f}  {'met' if row['met'] else 'missed'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, help="by submit, in each round")
    parser.add_argument("--alone", type=int, default=1_000, help="by delay, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--pool", action="append", choices=POOLS, help="only this one; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Told to end, it ends in order: what it started and wrote goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for variable in [name for name in os.environ if name.startswith(("CLUSTER_", "CELERY_"))]:
        # Nothing of the caller's cluster may be in the figures, nor the benchmark in his cluster.
        del os.environ[variable]
    pools = []
    for pool in options.pool or POOLS:
        with TemporaryDirectory(prefix="batching-") as name, RedisServer(Path(name)) as server:
            bench = Bench(server.url, Path(name))
            try:
                rounds = bench.rounds(pool, options.slots, options.rounds, options.alone, options.requests)
                pools.append(report(pool, options.slots, rounds))
            finally:
                bench.close()
    result = {
        "requests": options.requests, "alone": options.alone, "rounds": options.rounds, "mark": MARK,
        "met": any(row["met"] for row in pools), "pools": pools,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
