"""The apps that ``benchmarks.guarantees`` compares: a cluster, and one in which a guarantee is switched off.

Nothing in the project switches these off. The commit is that of Celery's own backend, which asks nobody whether the
node still holds the job; or nobody rings the doorbell of a node, which looks for work every ten milliseconds.
"""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.noop import CLUSTER, VARIANT
from benchmarks.noop import make_app as make_whole
from benchmarks.peers import job
from cluster_tasks.broker import channel, placement
from cluster_tasks.redis_store import script_source

IDLE_WAIT_S = channel.IDLE_WAIT_S
UNFENCED, UNRUNG = "without the fenced commit", "without the doorbell"
LOOK_EVERY_S = 0.01
RING = "  if listener then ring(keys, listener) end\n"


def make_app(variant: str, url: str, results: bool = True) -> Celery:
    """Return the app of a variant. The doorbell is that of the last app made in this process."""
    unrung = variant == UNRUNG
    placement.script_source = _without_ring if unrung else script_source
    channel.IDLE_WAIT_S = LOOK_EVERY_S if unrung else IDLE_WAIT_S
    app = make_whole(CLUSTER, url, results)
    if variant == UNFENCED:
        assert app.conf.result_backend == url  # It is configured by now.
        app.loader.override_backends = {}
    return app


def _without_ring(package: str, name: str) -> str:
    source = script_source(package, name)
    if name == "placing":
        assert RING in source, "place() rings in another way by now"
        source = source.replace(RING, "")
    return source


if job.REDIS_URL in os.environ:
    app = make_app(os.environ[VARIANT], os.environ[job.REDIS_URL], os.environ[job.RESULTS] == "1")
