"""What choosing a node costs, and all of ``delay()`` beside stock Celery's: ``python -m benchmarks.routing [--full]``.

Routing is the whole router as Celery calls it at each publish: view, eligibility, affinity, strategy, queue, by each
strategy among 10, 100 and 1,000 nodes. The view is refreshed by its own thread as in production: from memory, so that
neither network nor decoding is in the figures, from Redis, and from Consul, where nodes are registered. What a call
allocates is the most that it held at a time, as tracemalloc tells it, in calls of their own: that slows them down.

``delay()`` is timed with so many nodes at work in Redis, as far as Redis knows, in turns with that of a stock app, and
by batches; the median of the batches counts. Both ask for results, and both have the thread beside them that reads the
nodes four times a second.

The yardstick for p99 is a loop that adds numbers for as long as routing takes at the median, when nobody reads the
nodes any more: where it comes late, the machine has made it late.

Marks: p99 under 100 microseconds with up to 100 nodes and under a millisecond with 1,000; ``delay()`` costs at most
what it costs stock Celery.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median, quantiles
from typing import Any

from celery import Celery

from benchmarks.figures import in_turn
from benchmarks.noop import CLUSTER, REQUEST_TYPE, STOCK, make_app
from benchmarks.report import Benchmark, Mark, Row
from benchmarks.stage import private_consul, private_redis
from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.balancing import strategy_names
from cluster_tasks.broker.epochs import Predecessor
from cluster_tasks.clock import SystemClock
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.keys import Keys
from cluster_tasks.model import Capacity, Load, Node
from cluster_tasks.registry import create_registry
from cluster_tasks.router import QUIET_AFTER_S, STRATEGY_HEADER, ClusterRouter, ClusterView
from cluster_tasks.settings import ClusterSettings

MEMORY, REDIS, CONSUL = "memory", "redis", "consul"
P50, P99, DELAY, ALLOCATED = "p50, µs", "p99, µs", "delay(), µs", "allocated, bytes"
WHY_LATE = "the thread that reads and decodes the nodes, four times a second, holds the GIL meanwhile"
"""Read from memory they cost no decoding, and less is late."""
WHY_DEARER = "the script that places a job takes several times what LPUSH takes in Redis, routing and its keys the rest"
"""Of ``INFO commandstats`` and the processor time of both callers."""
ALLOCATED_CALLS = 200
BATCH = 500
SERVED = "llm"


def mark_us(nodes: int) -> float:
    """Return what p99 has to be below."""
    return 100.0 if nodes <= 100 else 1000.0


def members(count: int, serves: str = SERVED) -> list[Node]:
    """Return nodes of unequal size and load."""
    rng = random.Random(1)
    return [
        Node(
            id=f"node{number}@host{number % 10}",
            serves=frozenset({serves}),
            capacity=Capacity(max_connections=rng.choice((2, 4, 8)), max_memory_mb=64_000),
            load=Load(
                current_connections=rng.randrange(8),
                cpu_usage_percent=rng.uniform(0, 100),
                memory_usage_mb=rng.uniform(0, 64_000),
            ),
        )
        for number in range(count)
    ]


class Routing:
    """One router and its view of what ``read`` returns."""

    def __init__(self, read: Callable[[], Sequence[Node]]) -> None:
        app = Celery("routing", set_as_current=False)
        Cluster(app)

        @app.task(base=ClusterTask, shared=False, request_type=SERVED, affinity="session_id")
        def chat(prompt: str, session_id: str) -> str:
            return prompt + session_id

        settings, clock = ClusterSettings(), SystemClock()
        view = ClusterView(read, clock, settings.snapshot_s)
        self._router, self._task = ClusterRouter(settings, view, clock, random.Random(2)), chat
        self._arguments = [{"prompt": "Tell me more.", "session_id": f"session {number}"} for number in range(1000)]

    def route(self, strategy: str, number: int) -> None:
        """Route one job."""
        options = {"headers": {STRATEGY_HEADER: strategy}}
        self._router(self._task.name, (), self._arguments[number % 1000], options, task=self._task)

    def taken_us(self, strategy: str, calls: int, lasts_s: float) -> list[float]:
        """Return what each call took, of so many at least, and for so long: refreshes of the view are among them."""
        for number in range(1000):
            self.route(strategy, number)
        return timed_us(lambda number: self.route(strategy, number), calls, lasts_s)

    def allocated(self, strategy: str) -> float:
        """Return how many bytes a call holds at its most, the median of some: the view is refreshed in others."""
        tracemalloc.start()
        try:
            found = []
            for number in range(ALLOCATED_CALLS):
                held, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                self.route(strategy, number)
                found.append(tracemalloc.get_traced_memory()[1] - held)
        finally:
            tracemalloc.stop()
        return median(found)


def timed_us(call: Callable[[int], object], calls: int, lasts_s: float) -> list[float]:
    """Return what each call took, in microseconds, of so many at least, and for so long."""
    taken: list[float] = []
    until_s = time.monotonic() + lasts_s
    while len(taken) < calls or time.monotonic() < until_s:
        begin = time.perf_counter_ns()
        call(len(taken))
        taken.append((time.perf_counter_ns() - begin) / 1000)
    return taken


def loop_us(as_long_us: float, calls: int, lasts_s: float) -> list[float]:
    """Return what each of many loops took, of which one takes so long at the median."""
    numbers = 1000
    for _ in range(3):
        taken = timed_us(lambda _, numbers=numbers: sum(range(numbers)), 100, 0.0)
        numbers = max(1, round(numbers * as_long_us / median(taken)))
    return timed_us(lambda _: sum(range(numbers)), calls, lasts_s)


@contextmanager
def registered(url: str, nodes: Sequence[Node]) -> Iterator[Callable[[], Sequence[Node]]]:
    """Register nodes under a name of their own for as long as the block lasts; yield what lists them."""
    keys = Keys(f"routing-{secrets.token_hex(4)}")
    registry = create_registry(url, broker_url=url, keys=keys, clock=SystemClock())
    try:
        for node in nodes:
            registry.register(node)
        yield registry.list
    finally:
        registry.erase()
        registry.close()


class Publishing:
    """A stock app and one of a cluster of so many nodes, on one Redis."""

    def __init__(self, url: str, nodes: Sequence[Node]) -> None:
        self._apps = {variant: make_app(variant, url) for variant in (STOCK, CLUSTER)}
        self._cluster = cluster_of(self._apps[CLUSTER])
        self._cluster.client.flushall()
        for node in nodes:
            epoch = self._cluster.epochs.open(node.id, node.serves)
            assert not isinstance(epoch, Predecessor)
            self._cluster.registry.register(node.model_copy(update={"epoch": epoch}))

    def taken_us(self, strategy: str, rounds: int) -> list[dict[str, float]]:
        """Return microseconds for each ``delay()`` by variant, for each round."""
        for variant in (STOCK, CLUSTER):
            self._publish(variant, strategy)
        return [
            {variant: self._publish(variant, strategy) for variant in in_turn((STOCK, CLUSTER), number)}
            for number in range(rounds)
        ]

    def close(self) -> None:
        """Give up all connections."""
        for app in self._apps.values():
            app.close()

    def _publish(self, variant: str, strategy: str) -> float:
        app = self._apps[variant]
        task: Any = app.tasks["noop"]
        is_chosen = variant == CLUSTER and strategy != self._cluster.settings.strategy_for(REQUEST_TYPE)
        headers = {STRATEGY_HEADER: strategy} if is_chosen else None
        begin = time.perf_counter()
        results = [task.apply_async(headers=headers) for _ in range(BATCH)]
        taken_us = (time.perf_counter() - begin) / BATCH * 1e6
        # What was subscribed to is given up with these, and nobody would read Redis' answers to that.
        del results
        app.backend.result_consumer.on_after_fork()
        return taken_us


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what routing costs by registry, number of nodes and strategy, and then what publishing costs."""
    with ExitStack() as stack:
        redis_url = stack.enter_context(private_redis()).url
        urls: dict[str, str] = {}
        for name in options.registries:
            if name == CONSUL:
                try:
                    urls[name] = stack.enter_context(private_consul())
                except ConfigurationError as exc:
                    print(f"without Consul: {exc}", file=sys.stderr)
            else:
                urls[name] = redis_url if name == REDIS else ""
        for name, url in urls.items():
            for count in options.nodes:
                yield from routing(name, url, count, options)
        for count in options.nodes:
            publishing = Publishing(redis_url, members(count, REQUEST_TYPE))
            try:
                for strategy in options.strategies:
                    yield delaying(strategy, count, publishing.taken_us(strategy, options.rounds))
            finally:
                publishing.close()


def routing(registry: str, url: str, count: int, options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each strategy."""
    nodes, mark = members(count), Mark(of=P99, below=mark_us(count))
    with ExitStack() as stack:
        read = stack.enter_context(registered(url, nodes)) if url else lambda: list(nodes)
        router = Routing(read)
        rows: dict[str, dict[str, float]] = {}
        for strategy in options.strategies:
            taken = router.taken_us(strategy, options.calls, options.lasts)
            rows[strategy] = {**late(taken), ALLOCATED: router.allocated(strategy)}
        as_long_us = median(figures[P50] for figures in rows.values())
        # The thread that reads the nodes goes on for as long after the last call.
        time.sleep(QUIET_AFTER_S)
        yardstick = late(loop_us(as_long_us, options.calls, options.lasts))
        why = f"a loop as long has a p99 of {yardstick[P99]:.0f} µs here" + (f"; {WHY_LATE}" if url else "")
        for strategy, figures in rows.items():
            yield Row(f"{strategy}, {count} nodes in {registry}", figures, mark=mark, reason=why)
        yield Row(f"a loop as long, for {count} nodes in {registry}", yardstick)


def late(taken_us: Sequence[float]) -> dict[str, float]:
    """Return how long most calls took, and those that came late."""
    return {P50: median(taken_us), P99: quantiles(taken_us, n=100)[98]}


def delaying(strategy: str, count: int, rounds: Sequence[dict[str, float]]) -> Row:
    """Return what ``delay()`` costs."""
    return Row(
        f"{DELAY.partition(',')[0]}, {strategy}, {count} nodes",
        {DELAY: median(row[CLUSTER] for row in rounds), "stock, µs": median(row[STOCK] for row in rounds)},
        ratio=median(row[CLUSTER] / row[STOCK] for row in rounds),
        mark=Mark(at_most=1.0),
        reason=WHY_DEARER,
    )


def main() -> int:
    benchmark = Benchmark("routing", __doc__)
    counts, registries, strategies = [10, 100, 1000], [MEMORY, REDIS, CONSUL], [*strategy_names()]
    benchmark.option("--nodes", short=[100], full=counts, type=int, nargs="+", help="how many")
    benchmark.option(
        "--registries", short=[MEMORY, REDIS], full=registries, type=str, nargs="+", choices=registries,
        help="where the nodes are read from",
    )  # fmt: skip
    benchmark.option(
        "--strategies", short=strategies, full=strategies, type=str, nargs="+", choices=strategies, help="which ones"
    )
    benchmark.option("--calls", short=5_000, full=20_000, help="of the router, at least")
    benchmark.option("--lasts", short=1.0, full=5.0, help="seconds of calls, at least")
    benchmark.option("--rounds", short=3, full=9, help=f"batches of {BATCH} delay()")
    benchmark.note("ratio: the time of delay() over that of the stock app's, median of the rounds.")
    return benchmark.run(measure)


if __name__ == "__main__":
    sys.exit(main())
