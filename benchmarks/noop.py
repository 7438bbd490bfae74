"""The apps that ``benchmarks.throughput`` compares: the same job that does nothing, stock and in a cluster.

Its workers import this module: ``celery -A benchmarks.noop worker``, with the variables below.
"""

from __future__ import annotations

import os

from celery import Celery

from cluster_tasks import Cluster, ClusterTask

VARIANT = "BENCHMARK_VARIANT"
REDIS_URL = "BENCHMARK_REDIS_URL"

STOCK = "stock"
STOCK_LATE = "stock, acks_late"
CLUSTER = "cluster"
REQUEST_TYPE = "noop"


def make_app(variant: str, url: str) -> Celery:
    """Return an app whose one task is ``noop``; all settings that are not the variant are Celery's defaults."""
    app = Celery("noop", broker=url, backend=url, set_as_current=False)
    options: dict[str, object] = {}
    if variant == CLUSTER:
        Cluster(app)
        options = {"base": ClusterTask, "request_type": REQUEST_TYPE}
    app.conf.task_acks_late = variant == STOCK_LATE

    @app.task(name="noop", shared=False, **options)
    def noop() -> None:
        """Do nothing."""

    return app


if REDIS_URL in os.environ:
    app = make_app(os.environ[VARIANT], os.environ[REDIS_URL])
