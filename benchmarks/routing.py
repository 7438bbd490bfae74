"""What choosing a node costs, by strategy: ``python -m benchmarks.routing [--nodes 100] [--registry URL] [--json]``.

Measured is the whole router as Celery calls it at each publish: view, eligibility, affinity, strategy, queue. The view
is refreshed by its own thread as in production: from memory, so that neither network nor decoding is in the figures,
or from the registry at a URL (consul://…, etcd://…, redis://…), where nodes of a cluster of its own are registered.
Marks: p99 under 100 microseconds with 100 nodes in memory, and under a millisecond with any registry.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median, quantiles

from celery import Celery

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.balancing import strategy_names
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys
from cluster_tasks.model import Capacity, Load, Node
from cluster_tasks.registry import create_registry
from cluster_tasks.router import ClusterRouter, ClusterView
from cluster_tasks.settings import ClusterSettings

MARK_US, REGISTRY_MARK_US = 100.0, 1000.0
CALLS = 20_000
LASTS_S = 3.0
"""At least: some refreshes of the view have to be among the calls."""


def nodes(count: int) -> list[Node]:
    """Return nodes of unequal size and load."""
    rng = random.Random(1)
    return [
        Node(
            id=f"node{number}@host{number % 10}",
            serves=frozenset({"llm", "embedding"}),
            capacity=Capacity(max_connections=rng.choice((2, 4, 8)), max_memory_mb=64_000),
            load=Load(
                current_connections=rng.randrange(8),
                cpu_usage_percent=rng.uniform(0, 100),
                memory_usage_mb=rng.uniform(0, 64_000),
            ),
        )
        for number in range(count)
    ]


def measure(strategy: str, read: Callable[[], Sequence[Node]], mark_us: float) -> dict[str, object]:
    """Return p50 and p99 of routing one job, in microseconds, by a view of what ``read`` returns."""
    app = Celery("routing", set_as_current=False)
    Cluster(app)

    @app.task(base=ClusterTask, request_type="llm", affinity="session_id")
    def chat(prompt: str, session_id: str) -> str:
        return prompt + session_id

    settings, clock = ClusterSettings(), SystemClock()
    view = ClusterView(read, clock, settings.snapshot_s)
    router = ClusterRouter(settings, view, clock, random.Random(2))
    options = {"headers": {"strategy": strategy}}
    arguments = [{"prompt": "Tell me more.", "session_id": f"session {number}"} for number in range(1000)]
    for number in range(1000):
        router(chat.name, (), arguments[number], options, task=chat)
    taken_us: list[float] = []
    until_s = time.monotonic() + LASTS_S
    while len(taken_us) < CALLS or time.monotonic() < until_s:
        number = len(taken_us)
        begin = time.perf_counter_ns()
        router(chat.name, (), arguments[number % 1000], options, task=chat)
        taken_us.append((time.perf_counter_ns() - begin) / 1000)
    p99 = quantiles(taken_us, n=100)[98]
    return {"strategy": strategy, "nodes": len(read()), "p50_us": median(taken_us), "p99_us": p99, "met": p99 < mark_us}


@contextmanager
def registered(url: str, members: list[Node]) -> Iterator[Callable[[], Sequence[Node]]]:
    """Register nodes under a name of their own for as long as the block lasts; yield what lists them."""
    keys = Keys(f"routing-{secrets.token_hex(4)}")
    registry = create_registry(url, broker_url=url, keys=keys, clock=SystemClock())
    try:
        for node in members:
            registry.register(node)
        yield registry.list
    finally:
        registry.erase()
        registry.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--registry", metavar="URL", help="read the nodes from there (default: from memory)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    members = nodes(options.nodes)
    mark_us = REGISTRY_MARK_US if options.registry else MARK_US
    with registered(options.registry, members) if options.registry else nullcontext(lambda: list(members)) as read:
        rows = [measure(strategy, read, mark_us) for strategy in strategy_names()]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"routing one job among {options.nodes} nodes; mark: p99 < {mark_us:g} µs")
    for row in rows:
        verdict = "met" if row["met"] else "missed"
        print(f"{row['strategy']:>18}  p50 {row['p50_us']:6.1f} µs  p99 {row['p99_us']:6.1f} µs  {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
