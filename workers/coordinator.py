"""The coordinator: a solo worker that runs the control tasks, and the beat that sends them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery import Celery, beat, bootsteps

from cluster_tasks.cluster import cluster_of
from cluster_tasks.router import cluster_queue
from cluster_tasks.tasks.control import CHECK_HEALTH, OPTIMIZE, REBALANCE
from workers.agent import NodeAgent
from workers.bootsteps import NodeStep, ResyncStep, describe_coordinator, join
from workers.load import measure
from workers.serving import MetricsServer


class CoordinatorStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Registers the coordinator and sends its own checks, for as long as its worker lives."""

    label = "Coordinator"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        cluster = cluster_of(worker.app)
        self._agent = NodeAgent(cluster, describe_coordinator(cluster, worker.hostname), None, lambda: measure(0))
        settings = cluster.settings
        self._metrics = MetricsServer(cluster.metrics, settings.metrics_host, settings.metrics_port)
        self._beat = beat.EmbeddedService(worker.app, thread=True, scheduler_cls=beat.Scheduler)

    def start(self, worker: Any) -> None:
        """Join the cluster, and begin to send health checks and to serve metrics."""
        join(self._agent)
        self._beat.start()
        self._metrics.start()

    def stop(self, worker: Any) -> None:
        """Send nothing any more, and leave."""
        self._beat.stop()
        self._agent.stop()
        self._metrics.stop()

    terminate = stop


def coordinator(app: Celery, hostname: str, loglevel: str) -> Any:
    """Return a worker that coordinates the cluster of ``app``. The app is not fit for a node any more."""
    cluster = cluster_of(app)
    for name, step in (("worker", NodeStep), ("consumer", ResyncStep)):
        app.steps[name].discard(f"{step.__module__}:{step.__name__}")
    app.steps["worker"].add(CoordinatorStep)
    app.amqp.queues.add(cluster_queue(cluster.keys.control_queue))
    # What it sends are checks: see the control tasks for why they make no events.
    app.conf.task_send_sent_event = False
    # Beat entries of the users are sent by their own beat.
    settings, every = cluster.settings, {CHECK_HEALTH: cluster.settings.health_check_s}
    if settings.auto_rebalance:
        every[REBALANCE] = settings.rebalance_s
    if settings.optimize_s:
        every[OPTIMIZE] = settings.optimize_s
    app.conf.beat_schedule = {
        name: {
            "task": name,
            "schedule": timedelta(seconds=interval_s),
            "options": {"queue": cluster.keys.control_queue},
        }
        for name, interval_s in every.items()
    }
    return app.Worker(
        hostname=hostname, pool="solo", concurrency=1, queues=[cluster.keys.control_queue], loglevel=loglevel,
        without_gossip=True, without_mingle=True,
    )  # fmt: skip
