"""The apps that are compared under load: the same job that sleeps, stock and in a cluster.

Their workers import this module: ``celery -A benchmarks.sleeping worker``, with the variables below. A job sleeps, so
many workers share two cores without being in each other's way. With a key it is *warm* where one of the last
jobs of its worker had the same, and sleeps half as long then, as a model does whose cache holds the prompt.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, signals

from benchmarks.figures import Warm
from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.redis_store import connect

VARIANT = "BENCHMARK_VARIANT"
REDIS_URL = "BENCHMARK_REDIS_URL"
WARM_KEYS = "BENCHMARK_WARM_KEYS"
"""How many keys a worker keeps warm."""
STOCK_VISIBILITY = "BENCHMARK_STOCK_VISIBILITY_S"
"""After so many seconds without an acknowledgement the stock transport delivers a job again (default: 3,600)."""

STOCK, CLUSTER = "stock", "cluster"
REQUEST_TYPE = "sleep"
READY = "benchmark:ready"
"""Set of the process ids of the workers that consume."""
WARM_SHARE = 0.5
"""Of its time a warm job takes."""
WORK = "work"


def make_app(variant: str, url: str, warm_keys: int = 0, visibility_s: float | None = None) -> Celery:
    """Return an app whose one task is ``work``.

    The stock one is set up as Celery's guide advises for jobs that may not be lost and are longer than their
    messages: late acknowledgement, rejected if the worker is lost, one message in advance (``-O fair`` is the default).
    """
    app = Celery("sleeping", broker=url, backend=url, set_as_current=False)
    options: dict[str, object] = {}
    if variant == CLUSTER:
        Cluster(app)
        options = {"base": ClusterTask, "request_type": REQUEST_TYPE, "affinity": "key"}
    else:
        app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)
        if visibility_s is not None:
            app.conf.broker_transport_options = {"visibility_timeout": visibility_s}
    warm = Warm(warm_keys)

    @app.task(name=WORK, bind=True, shared=False, **options)
    def work(self: Any, seconds: float, key: str = "") -> dict[str, object]:
        """Sleep."""
        begun = time.time()
        is_warm = bool(key) and warm.use(key)
        time.sleep(seconds * WARM_SHARE if is_warm else seconds)
        return {"node": self.request.hostname, "begun": begun, "warm": is_warm}

    return app


def tell_ready(url: str) -> None:
    """Tell that the worker of this process consumes."""
    with connect(url) as client:
        client.sadd(READY, os.getpid())


if REDIS_URL in os.environ:
    visibility = os.environ.get(STOCK_VISIBILITY)
    app = make_app(
        os.environ[VARIANT],
        os.environ[REDIS_URL],
        int(os.environ.get(WARM_KEYS, "0")),
        float(visibility) if visibility else None,
    )
    signals.worker_ready.connect(lambda **_: tell_ready(os.environ[REDIS_URL]), weak=False)
