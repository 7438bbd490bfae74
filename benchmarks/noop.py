"""The apps that ``benchmarks.throughput`` compares: the same job that does nothing, stock and in a cluster.

Its workers import this module: ``celery -A benchmarks.noop worker``, with the variables below and those of
``benchmarks.peers.job``. The stock worker fetches far ahead, as Celery's guide advises for short jobs.
"""

from __future__ import annotations

import os
from cProfile import Profile

from celery import Celery, signals

from benchmarks.peers import job
from cluster_tasks import Cluster, ClusterTask

VARIANT, PROFILE = "BENCHMARK_VARIANT", "BENCHMARK_PROFILE"
"""The second names a file for a profile of the worker's main thread; without it there is none."""

STOCK = "stock"
STOCK_LATE = "stock, acks_late"
CLUSTER = "cluster"
REQUEST_TYPE = "noop"
PREFETCH = 64
"""Jobs a slot; "if you have many tasks with a short duration … 64 or 128" (Celery's guide, Optimizing)."""


def make_app(variant: str, url: str, results: bool = True) -> Celery:
    """Return an app whose one task is ``noop``; all settings but these few are Celery's defaults."""
    app = Celery("noop", broker=url, backend=url, set_as_current=False)
    options: dict[str, object] = {}
    if variant == CLUSTER:
        Cluster(app)
        options = {"base": ClusterTask, "request_type": REQUEST_TYPE}
    else:
        app.conf.worker_prefetch_multiplier = PREFETCH
    app.conf.task_acks_late = variant == STOCK_LATE
    app.conf.task_ignore_result = not results

    @app.task(name="noop", shared=False, **options)
    def noop() -> None:
        """Do nothing."""
        job.noop()

    return app


def profile(file: str) -> None:
    """Profile this worker from when it is ready until it shuts down."""
    made = Profile()

    def end(**_: object) -> None:
        made.disable()
        made.dump_stats(file)

    signals.worker_ready.connect(lambda **_: made.enable(), weak=False)
    signals.worker_shutdown.connect(end, weak=False)


if PROFILE in os.environ:
    profile(os.environ[PROFILE])
if job.REDIS_URL in os.environ:
    app = make_app(os.environ[VARIANT], os.environ[job.REDIS_URL], os.environ[job.RESULTS] == "1")
