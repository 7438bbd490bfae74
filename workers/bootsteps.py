"""Where the node's runtime hooks into Celery's worker. The only module that knows Celery's step classes."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from typing import Any

import redis
from celery import Task, bootsteps, signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.platforms import EX_FAILURE, EX_OK
from celery.worker import state
from kombu.exceptions import OperationalError
from vine import promise

from cluster_tasks.broker import deliveries
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.message import Delivery
from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.errors import BrokerUnavailable, NodeNameTaken, UnavailableError
from cluster_tasks.model import Capacity, Node, NodeRole
from cluster_tasks.router import cluster_queue
from cluster_tasks.tasks.base import ClusterTask
from workers import control
from workers.agent import NodeAgent
from workers.batches import batches
from workers.drain import Departure, end_process
from workers.executions import Executions
from workers.heartbeat import HeartbeatProcess
from workers.holding import Holding
from workers.load import measure
from workers.periodic import Periodic
from workers.progress import LOOK_EVERY_S, Progress, Pulse, stack_of
from workers.refusals import Refusals
from workers.reports import keep_what_was_sent, read_to_the_end, sent_requests
from workers.request import keeping_errors_in
from workers.suspects import Suspects
from workers.tracing import follow_jobs

logger = logging.getLogger(__name__)

REFUSED_POOLS = ("gevent", "eventlet")
STOCK_REQUEST = Task.Request
JOIN_AGAIN_S = 2.0
EVENTS_TOGETHER_S = 0.1
"""So long events of jobs wait for others, to be published as one."""


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Makes a worker a node: it consumes its own list, and its agent lives as long as it does."""

    label = "Node"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        cluster = cluster_of(worker.app)
        pool = worker.pool_cls.__module__.rpartition(".")[2]
        if pool in REFUSED_POOLS:
            raise SystemExit(
                f"a node cannot use the pool {pool}: its heartbeat and its waiting for work are threads, and "
                "green ones would stop all of that with the first job that computes; use -P threads or prefork"
            )
        # Gossip and mingle grow with the square of the number of nodes; the registry does their work.
        worker.options.update(without_gossip=True, without_mingle=True)
        # More than the pool runs is never held: what waits must stay where others can take it.
        worker.prefetch_multiplier = 1
        self._cluster, self._hostname = cluster, worker.hostname
        self._agent: NodeAgent | None = None
        self._pulse, self._holding = Pulse(), Holding(cluster, worker.hostname)
        worker.app.amqp.queues.select_add(cluster_queue(cluster.keys.node_queue(worker.hostname)))
        follow_jobs()
        # In each child of prefork, before it is given a job; the other pools use the memory of this process.
        signals.worker_process_init.connect(self._warm)
        signals.worker_process_init.connect(self._hold)
        signals.worker_process_shutdown.connect(self._count)
        signals.worker_shutdown.connect(self._leave, sender=worker)
        signals.worker_shutting_down.connect(self._shutting_down, sender=worker.hostname)

    def start(self, worker: Any) -> None:
        """Join the cluster: register, beat, and look after what the node holds."""
        cluster = self._cluster
        node = describe(cluster, worker)
        register = Deliveries(
            node.id, node.serves, cluster.keys, cluster.client, cluster.clock, lambda: free_slots(worker)
        )
        # Children of prefork have a GIL of their own; tasks of the other pools share the agent's.
        helper = None if isinstance(worker.pool, PreforkPool) else HeartbeatProcess(cluster.settings, node.id)
        if isinstance(worker.pool, PreforkPool):
            read_to_the_end(worker.pool._pool._result_handler)
            keep_what_was_sent(worker.pool)
        executions = Executions(worker.pool)
        agent = NodeAgent(
            cluster, node, register, lambda: measure(register.held() + len(plain_requests()), register.trial), helper,
            executions,
        )  # fmt: skip
        self._accompany(agent, register, executions, Progress(worker, register, executions, self._pulse))
        if not isinstance(worker.pool, PreforkPool):
            self._warm()
            self._hold()
        join(agent)
        self._departure.start()
        self._watch.start()
        deliveries.install(register)
        control.install()
        for task in worker.app.tasks.values():
            # Of any task, what comes from a list of the cluster is handled as a job of the cluster.
            if task.Request == STOCK_REQUEST:
                task.Request = ClusterTask.Request
        logger.info("node %s joined cluster %s", node.id, cluster.settings.name)

    def _warm(self, **_: Any) -> None:
        if warmed := self._cluster.caches.warm_for(self._hostname):
            logger.info("%d values of the cache are here before they are asked for", warmed)

    def _hold(self, **_: Any) -> None:
        self._holding.start()

    def _count(self, **_: Any) -> None:
        self._cluster.caches.flush()

    def _accompany(self, agent: NodeAgent, register: Deliveries, executions: Executions, progress: Progress) -> None:
        settings = self._cluster.settings
        self._departure = Departure(
            settings.drain_timeout_s,
            drain=agent.drain, hand_back=agent.hand_back, hopeless=register.holds_only_what_was_taken,
            foreign=executions.foreign, leave=self._leave,
        )  # fmt: skip
        self._watch = Periodic("progress", LOOK_EVERY_S, lambda: self._watch_progress(agent, register, progress))
        self._agent = agent

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Let the loop show that it turns, and look for dead children each second."""
        self._pulse.beat()
        hub.call_repeatedly(LOOK_EVERY_S, self._pulse.beat)
        if isinstance(worker.pool, PreforkPool):
            # Celery looks for children that died every five seconds.
            hub.call_repeatedly(1.0, worker.pool.maintain_pool)

    def close(self, worker: Any) -> None:
        """The worker begins to shut down: what only waits goes to others at once."""
        if self._agent is not None:
            self._departure.begin(worker.exitcode or EX_OK)

    def terminate(self, worker: Any) -> None:
        """Leave at once: what the node holds is given back."""
        self._leave()

    def _shutting_down(self, how: str, exitcode: int, **_: Any) -> None:
        # Told by the signal itself: the loop of solo hears of it only when its job has ended.
        if how == "Warm" and self._agent is not None:
            self._departure.begin(exitcode)

    def _watch_progress(self, agent: NodeAgent, register: Deliveries, progress: Progress) -> None:
        settings, clock = self._cluster.settings, self._cluster.clock
        reason = "" if self._departure.begun else progress.look(agent.beats, clock.monotonic(), settings.stuck_after_s)
        if not reason:
            return
        logger.critical(
            "this node is stuck: %s. It gives its jobs to others, and exits. Its event loop is at:\n%s",
            reason, stack_of(register.loop_thread),
        )  # fmt: skip
        try:
            agent.give_up(reason)
        except UnavailableError as exc:
            logger.critical("leaving without a word, the others will notice: %s", exc)
        end_process(os.EX_SOFTWARE)

    def _leave(self, **_: Any) -> None:
        # By signal and not in stop(): Celery stops this step before the pool, whose jobs must end under our epoch.
        agent, self._agent = self._agent, None
        if agent is not None:
            self._departure.stop()
            self._watch.stop()
            if (error := _unasked_end()) is not None:
                logger.error("this node ends by an error, what it still holds is charged with that: %r", error)
            try:
                agent.stop(in_good_order=error is None)
            except UnavailableError as exc:
                logger.warning("leaving without a word, the others will notice: %s", exc)
            # The last: it may be loading something large.
            self._holding.stop()


class ResyncStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """After each connection, delivers again what Celery dropped when the one before broke."""

    label = "Resync"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._refusals = Refusals(consumer, cluster_of(consumer.app))
        batches.gather(consumer)

    def start(self, consumer: Any) -> None:
        """After each connection: deliver what Redis says that the node holds, and the pool does not."""
        node = deliveries.current()
        if node is None:
            return
        batches.clear()
        node.all_read = batches.all_read
        node.admit = Suspects(cluster_of(consumer.app), node, self._refusals).admit
        for task in consumer.app.tasks.values():
            task.__trace__ = keeping_errors_in(task)
        sent = sent_requests(consumer.pool) if isinstance(consumer.pool, PreforkPool) else []
        for request in sent:
            state.task_reserved(request)
        again = node.resync({request.message.delivery_tag for request in [*state.active_requests, *sent]})
        if again:
            logger.warning("%d jobs that the broken connection had dropped are delivered again", again)


class EventsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Has fewer publishes for the events of jobs: Celery's loop makes one at each turn, which may be three a job."""

    label = "EventsTogether"
    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._consumer = consumer
        self._dispatcher: Any = None
        # One for all: the loop keeps what it is to call in a set, and may not turn for long.
        self._wait = promise(self._wait_for_others)
        self._is_due = False

    def include_if(self, consumer: Any) -> bool:
        """Where there is no loop, Celery publishes each at once."""
        return consumer.hub is not None

    def create(self, consumer: Any) -> None:
        """Before the first dispatcher is made: each is given what is called when an event waits."""
        # In solo the loop does not turn while a job runs: the end of one would be told after that of the next.
        if not isinstance(consumer.pool, SoloPool):
            consumer.on_send_event_buffered = self._buffered

    def start(self, consumer: Any) -> None:
        """After each connection, which has a dispatcher of its own: of what waits, Celery passes on a part."""
        last, self._dispatcher = self._dispatcher, consumer.event_dispatcher
        # Timers have ended with the connection.
        self._is_due = False
        if last is not None and (waiting := last._group_buffer.pop("task", None)):
            self._dispatcher._group_buffer["task"][:0] = waiting
            consumer.on_send_event_buffered()

    def shutdown(self, consumer: Any) -> None:
        """Publish what waits when the worker ends; if only its connection has broken, the next dispatcher does."""
        self._publish()
        if consumer.event_dispatcher is not None:
            # Celery has said so before, but a monitor takes whoever tells anything after that for alive.
            consumer.event_dispatcher.send("worker-offline")

    def _buffered(self) -> None:
        # Events come from threads of the pool, too, and timers are the loop's.
        if not self._is_due:
            self._consumer.hub.call_soon(self._wait)

    def _wait_for_others(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._consumer.hub.call_later(EVENTS_TOGETHER_S, self._publish)

    def _publish(self) -> None:
        # First: what is added meanwhile is published next.
        self._is_due = False
        # There is none with --without-heartbeat and without -E.
        if self._consumer.event_dispatcher is not None:
            self._consumer.event_dispatcher.flush()


def _unasked_end() -> BaseException | None:
    """The error by which the worker comes to its end, if nobody told it to end.

    A message that breaks the consumer would otherwise go from node to node, and end all of them uncounted. The loss of
    the broker is no job's fault.
    """
    error = sys.exception()
    # These two are how Celery ends a worker that was told to.
    asked = WorkerShutdown, WorkerTerminate, KeyboardInterrupt, OperationalError, redis.ConnectionError
    return None if isinstance(error, asked) else error


def join(agent: NodeAgent) -> None:
    """Start an agent, as soon as Redis is there. A name that is taken ends the worker with that reason."""
    while True:
        try:
            agent.start()
            return
        except NodeNameTaken as exc:
            logger.critical("%s", exc)
            raise WorkerShutdown(EX_FAILURE) from None
        except BrokerUnavailable as exc:
            logger.error("this node cannot join yet, it tries again in %g s: %s", JOIN_AGAIN_S, exc)
        until_s = time.monotonic() + JOIN_AGAIN_S
        while time.monotonic() < until_s:
            time.sleep(0.1)
            state.maybe_shutdown()


def describe(cluster: Cluster, worker: Any) -> Node:
    """Return the node that a Celery worker is, as its settings and its pool say."""
    settings = cluster.settings
    size = worker.max_concurrency or worker.pool.num_processes
    return Node(
        id=worker.hostname,
        name=worker.hostname.partition("@")[0],
        address=settings.address or socket.gethostname(),
        port=settings.port,
        roles=settings.roles,
        capacity=Capacity(
            max_connections=size, max_qps=settings.max_qps, max_memory_mb=settings.max_memory_mb, max_threads=size
        ),
        metadata=settings.node_metadata,
        serves=cluster.served_types(),
    )


def describe_coordinator(cluster: Cluster, hostname: str) -> Node:
    """Return the node that a coordinator is: it serves nothing and has no slots."""
    return Node(
        id=hostname,
        name=hostname.partition("@")[0],
        address=cluster.settings.address or socket.gethostname(),
        port=cluster.settings.metrics_port,
        roles=frozenset({NodeRole.MASTER}),
        capacity=Capacity(max_connections=0, max_threads=0),
        metadata=cluster.settings.node_metadata,
    )


def free_slots(worker: Any) -> int:
    """Jobs the worker may hold: its pool, and those that wait in it for their time, as Celery counts them.

    A pool that scales itself grows when it holds more than it runs: it is given what it may grow to. What other queues
    delivered Kombu counts until it is acknowledged, and plain tasks are when they begin.
    """
    consumer, autoscaler = worker.consumer, worker.autoscaler
    waiting = consumer.qos.value - consumer.initial_prefetch_count if consumer.qos else 0
    size = max(worker.pool.num_processes, autoscaler.max_concurrency if autoscaler else 0)
    return int(size + max(waiting, 0) - sum(request.acknowledged for request in plain_requests()))


def plain_requests() -> list[Any]:
    """The jobs of other queues that run here."""
    while True:
        try:
            running = list(state.active_requests)
        except RuntimeError:
            # A thread of the pool has just begun with another one.
            continue
        return [request for request in running if Delivery.of(request.message.properties) is None]
