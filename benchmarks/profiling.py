"""Where the time of a job goes, in a node and in a stock worker: ``python -m benchmarks.profiling [--full] [--json]``.

One worker of pool solo, whose one thread does all there is to do for a job, runs jobs that do nothing under cProfile,
from when it is ready until it shuts down. A row has the microseconds a job that were spent in the code of one package
itself, not in what it calls. Under a profile Python runs slower, small functions most of all: the shares mean
something, the sum does not. What a node does in other threads is not in it.
"""

from __future__ import annotations

import argparse
import pstats
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.noop import CLUSTER, PROFILE, STOCK_LATE
from benchmarks.report import Benchmark, Row
from benchmarks.stage import HOME, private_redis
from benchmarks.throughput import SOLO, Bench

VARIANTS = {"cluster": CLUSTER, "stock": STOCK_LATE}
WAITING = ("recv", "poll", "select", "sendall", "fsync")
"""In the name of a built-in function that waits for somebody else."""


def place(file: str, function: str) -> str:
    """Return the package that a function belongs to."""
    if file == "~":
        return "sockets" if any(word in function for word in WAITING) else "built-in functions"
    path = Path(file)
    if "site-packages" in path.parts:
        return path.parts[path.parts.index("site-packages") + 1].removesuffix(".py")
    return path.relative_to(HOME).parts[0] if path.is_relative_to(HOME) else "standard library"


def spent_us(profile: Path, jobs: int) -> Counter[str]:
    """Return microseconds a job by package."""
    found: Counter[str] = Counter()
    stats: Any = pstats.Stats(str(profile))
    for (file, _, function), (_, _, own_s, *_) in stats.stats.items():
        found[place(file, function)] += own_s / jobs * 1e6
    return found


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each package that takes a microsecond a job, the largest first."""
    found: dict[str, Counter[str]] = {}
    with private_redis() as server:
        bench = Bench(server.url, server.directory, options.jobs)
        try:
            for name, variant in VARIANTS.items():
                profile = server.directory / f"{name}.profile"
                bench.celery(variant, SOLO, 1, options.results, more={PROFILE: str(profile)})
                found[name] = spent_us(profile, options.jobs)
        finally:
            bench.close()
    ours = found["cluster"]
    for package in sorted({*ours, *found["stock"]}, key=lambda package: -ours[package]):
        if max(own[package] for own in found.values()) >= 1:
            yield Row(package, {f"{name}, µs a job": own[package] for name, own in found.items()})
    yield Row("all", {f"{name}, µs a job": own.total() for name, own in found.items()})


def main() -> int:
    benchmark = Benchmark("profiling", __doc__)
    benchmark.option("--jobs", short=1_000, full=10_000, help="of each worker")
    benchmark.parser.add_argument("--no-results", dest="results", action="store_false", help="store none")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
