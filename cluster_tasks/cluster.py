"""``Cluster``: wires everything to one Celery app."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from threading import Event, RLock
from time import sleep
from typing import Any

import redis
from celery import Celery, signals
from celery.app.routes import Router
from kombu.utils.imports import symbol_by_name
from prometheus_client.registry import Collector

from cluster_tasks.awaiting import Awaiting
from cluster_tasks.balancing import create_balancer
from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.broker.amqp import ClusterAMQP, ClusterQueues
from cluster_tasks.broker.delays import DelayedJob, delayed_jobs
from cluster_tasks.broker.epochs import EpochTable, Lists
from cluster_tasks.broker.placement import Placer
from cluster_tasks.broker.revocations import ClusterControl, Revocations
from cluster_tasks.cache import Cache, Caches, create_caches
from cluster_tasks.clock import SystemClock
from cluster_tasks.configuration import configure, given_settings
from cluster_tasks.errors import (
    BrokerUnavailable,
    ClusterError,
    ConfigurationError,
    RegistryUnavailable,
    UnavailableError,
)
from cluster_tasks.failover.alerts import AlertQueue, AlertSender, Webhook
from cluster_tasks.failover.detector import Detector, Silent
from cluster_tasks.failover.draining import Draining
from cluster_tasks.failover.ejection import Ejection
from cluster_tasks.failover.evacuation import Evacuation, Moved
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.health import HealthCheck
from cluster_tasks.failover.quarantine import Quarantine
from cluster_tasks.failover.rebalance import Rebalance, Rebalanced
from cluster_tasks.failover.release import Release
from cluster_tasks.failover.watchers import Watchers
from cluster_tasks.gateway.guard import Neighbourhood
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks, create_locks
from cluster_tasks.metrics.collector import SCRAPE_S, ClusterCollector
from cluster_tasks.metrics.in_flower import show_in_flower
from cluster_tasks.metrics.snapshot import BrokerReader
from cluster_tasks.model import Node, NodeEvent, NodeFilter, NodeRole, NodeStatus, check_node_id
from cluster_tasks.redis_store import (
    CONNECT_TIMEOUT_S,
    SOCKET_TIMEOUT_S,
    connect,
    foreign_errors,
)
from cluster_tasks.registry import create_registry
from cluster_tasks.registry.base import ALL, Registry
from cluster_tasks.registry.joined import ClusterNodes, JoinedRegistries, RegistryReader, where_to_send
from cluster_tasks.router import ClusterRouter, ClusterView
from cluster_tasks.runtime import check_runtime
from cluster_tasks.settings import CONF_PREFIX, ClusterSettings, load_settings
from cluster_tasks.shards.assignments import AssignmentTable
from cluster_tasks.shards.manager import ShardManager
from cluster_tasks.shards.shard_map import ShardMap
from cluster_tasks.tasks import apps
from cluster_tasks.tasks.base import ClusterTask
from cluster_tasks.tasks.control import CHECK_HEALTH, OPTIMIZE, REBALANCE, register_control_tasks
from cluster_tasks.tasks.submitting import Submitted, submit

logger = logging.getLogger(__name__)

REBALANCED_AT_ONCE = 2_000
"""Jobs that are moved from one list on a beat."""
JOINED_FRESH_S = 1.0
"""So often other clusters are looked at by who chooses among them."""
PROVIDER_TIMEOUT_S = 1.0
"""The longest that a job waits for what Redis knows of its provider."""


def cluster_of(app: Celery) -> Cluster:
    """Return the cluster of an app. Raises ClusterError if none was made for it."""
    cluster = apps.cluster_of(app)
    assert isinstance(cluster, Cluster)
    return cluster


class Cluster:
    """Makes the workers of a Celery app the nodes of a cluster.

    ``Cluster(app)`` does no I/O and may stand before or after the app is configured. Tasks whose base is
    ``ClusterTask`` are balanced; all others stay where they were.
    """

    def __init__(self, app: Celery) -> None:
        self.app, self.clock = app, SystemClock()
        apps.join(app, self)
        self._settings: ClusterSettings | ConfigurationError | None = None
        self._configuring = RLock()
        # A class of its own hands the app's messaging this cluster's router, whatever sets task_routes, and when.
        queues = type("Queues", (ClusterQueues,), {"lists_of_the_cluster": staticmethod(self._lists)})
        own = {"cluster_route": staticmethod(self._route), "queues_cls": queues}
        app.amqp_cls = type("AMQP", (ClusterAMQP, symbol_by_name(app.amqp_cls)), own)
        # Celery asks a class for what an object of it has.
        own = {"revocations": property(lambda _: self.revocations)}
        app.control_cls = type("Control", (ClusterControl, symbol_by_name(app.control_cls)), own)
        for used in ("amqp", "control"):
            app.__dict__.pop(used, None)
        app.steps["worker"].add("workers.bootsteps:NodeStep")
        app.steps["consumer"].update(f"workers.bootsteps:{name}" for name in ("EventsStep", "ResyncStep"))
        duties = {
            CHECK_HEALTH: self._check_health, REBALANCE: self._rebalance_a_little,
            OPTIMIZE: self.optimize_collections,
        }  # fmt: skip
        register_control_tasks(app, duties)
        signals.worker_init.connect(self._check_runtime, weak=False)
        show_in_flower(app, lambda: self.metrics)
        if app.configured:
            self._configure()
            self.settings  # noqa: B018 - a wrong setting is refused here, where it is set
        else:
            app.on_after_configure.connect(self._configure, weak=False)

    @property
    def settings(self) -> ClusterSettings:
        """The settings, validated. Raises ConfigurationError."""
        if self._settings is None:
            with self._configuring:
                # Reading the configuration makes Celery load it, and calls _configure.
                self.app.conf.get("broker_url")
                if self._settings is None:
                    # Another thread has loaded it, and has not come to that yet.
                    self._configure()
        if isinstance(self._settings, ConfigurationError):
            raise self._settings
        assert self._settings is not None
        return self._settings

    @cached_property
    def _placer(self) -> Placer:
        return Placer(self.client, self.keys)

    @cached_property
    def keys(self) -> Keys:
        """Names of this cluster's Redis keys."""
        return Keys(self.settings.name)

    @cached_property
    def client(self) -> redis.Redis:
        """A client of the broker's Redis; connects when it is used."""
        return connect(self._broker_url, sentinel_master=self.settings.sentinel_master)

    @cached_property
    def awaiting(self) -> Awaiting:
        """Results of jobs for asyncio."""
        return Awaiting(self.app, self.settings.sentinel_master)

    @cached_property
    def epochs(self) -> EpochTable:
        """Who may work."""
        return EpochTable(self.client, self.keys)

    @cached_property
    def registry(self) -> Registry:
        """Who exists."""
        return create_registry(
            self.settings.registry_url, broker_url=self._broker_url, keys=self.keys, clock=self.clock,
            sentinel_master=self.settings.sentinel_master,
        )  # fmt: skip

    @cached_property
    def joined(self) -> JoinedRegistries:
        """Who exists in other clusters, to look at: nothing of this cluster counts, fences or moves them."""
        return JoinedRegistries(self._open_joined)

    @cached_property
    def _joined_views(self) -> dict[str, ClusterView]:
        registries = self.joined.registries
        return {name: ClusterView(registries[name].list, self.clock, JOINED_FRESH_S, name) for name in registries}

    @cached_property
    def locks(self) -> Locks:
        """What must be done by one at a time."""
        return create_locks(
            self.settings.registry_url, broker_url=self._broker_url, keys=self.keys, clock=self.clock,
            sentinel_master=self.settings.sentinel_master,
        )  # fmt: skip

    @cached_property
    def caches(self) -> Caches:
        """What is kept so as not to compute it again, by namespaces."""
        return create_caches(self.settings, self.keys, self.clock)

    @property
    def cache(self) -> Cache:
        """The namespace of the cache for tasks of your own that name none."""
        return self.caches.namespace()

    @cached_property
    def events(self) -> EventLog:
        """What happened."""
        return EventLog(self.client, self.keys, self.clock)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """What the providers of this process share with those of the other nodes."""
        options = {"socket_timeout": PROVIDER_TIMEOUT_S, "socket_connect_timeout": PROVIDER_TIMEOUT_S}
        # Without health checks: they would be a second round trip.
        client = connect(
            self._broker_url, sentinel_master=self.settings.sentinel_master, health_check_interval=0, **options
        )
        events = EventLog(client, self.keys, self.clock)

        def tell(kind: str, **facts: Any) -> None:
            try:
                events.add(kind, **facts)
            except BrokerUnavailable as exc:
                logger.warning("the event %r could not be written: %s", kind, exc)

        return Neighbourhood(client, self.keys, self.clock, tell)

    @cached_property
    def evacuation(self) -> Evacuation:
        """Moves jobs that nobody owns."""
        return Evacuation(self.client, self.keys)

    @cached_property
    def draining(self) -> Draining:
        """Nodes that take nothing new."""
        return Draining(self.client, self.keys, self.clock, self.epochs, self.evacuation, self.registry, self.events)

    @cached_property
    def revocations(self) -> Revocations:
        """Jobs that must not run any more."""
        return Revocations(self.client, self.keys)

    @cached_property
    def quarantine(self) -> Quarantine:
        """Jobs that are not run any more, for too many processes died of them."""
        settings = self.settings
        return Quarantine(self.client, self.keys, self.clock, settings.quarantine_ttl_s, settings.quarantine_max)

    def alert_sender(self, may_send: Callable[[], bool]) -> AlertSender | None:
        """Return what sends alerts while ``may_send`` says so; None if no webhook is set."""
        url, secret = self.settings.alert_url, self.settings.alert_secret
        if url is None:
            return None
        webhook = Webhook(url.get_secret_value(), secret.get_secret_value() if secret else None)
        return AlertSender(AlertQueue(self.client, self.keys), webhook, self.settings.name, self.clock, may_send)

    @cached_property
    def health(self) -> HealthCheck:
        """This process as observer of the others."""
        # A node may have asked just before Redis came back, and must first give that up.
        outage_s = SOCKET_TIMEOUT_S + CONNECT_TIMEOUT_S
        detector = Detector(self.clock, self.settings.lease_s, self.settings.failure_threshold, outage_s)
        return HealthCheck(self.epochs, detector, self.evacuation, self.registry, self.events, self.clock)

    @cached_property
    def watchers(self) -> Watchers:
        """Who observes the others where no coordinator does."""
        return Watchers(self.client, self.keys, self.settings.lease_s)

    @cached_property
    def ejection(self) -> Ejection:
        """This process as judge of the others."""
        settings = self.settings
        policy = BreakerPolicy(
            success_threshold=settings.breaker_success_threshold, timeout_s=settings.breaker_timeout_s,
            probe_lease_s=settings.breaker_timeout_s,
        )  # fmt: skip
        return Ejection(
            self.epochs, self.evacuation, self.events, self.keys, self.clock, policy, settings.ejection_slow_factor,
            self.registry.list,
        )  # fmt: skip

    @cached_property
    def metrics(self) -> Collector:
        """What Prometheus is told of the whole cluster; does I/O when it is scraped.

        Coordinators and Flower serve it. For an app of yours that is scraped:
        ``prometheus_client.REGISTRY.register(cluster.metrics)``.
        """
        settings = self.settings
        client = connect(
            self._broker_url, sentinel_master=settings.sentinel_master, health_check_interval=0,
            socket_timeout=SCRAPE_S, socket_connect_timeout=SCRAPE_S,
        )  # fmt: skip
        breaker = BreakerPolicy(timeout_s=settings.breaker_timeout_s)
        cache = self.caches.sums if settings.cache_url is not None else None
        return ClusterCollector(
            settings.lease_s, BrokerReader(client, self.keys, breaker).read, self.registry.list, cache
        )

    @cached_property
    def assignments(self) -> AssignmentTable:
        """Which nodes are to hold which shards, and which are ready."""
        return AssignmentTable(self.client, self.keys)

    @cached_property
    def shard_manager(self) -> ShardManager:
        """This process as planner of that."""
        return ShardManager(
            self.assignments, self.epochs, self._read_nodes, self.events.entry, self.settings.shard_replicas
        )

    @cached_property
    def shard_map(self) -> ShardMap:
        """Whom to ask for which shards."""
        return ShardMap(self.assignments, self.view.nodes, self.clock, self.settings.snapshot_s)

    @cached_property
    def view(self) -> ClusterView:
        """The nodes as last seen."""
        return ClusterView(self._read_nodes, self.clock, self.settings.snapshot_s)

    @cached_property
    def router(self) -> ClusterRouter:
        """What Celery asks for the queue of each job."""
        return ClusterRouter(self.settings, self.view, self.clock, random.Random())

    async def wait(self, result: Any, timeout_s: float | None = None, *, propagate: bool = True) -> Any:
        """Return what ``result.get()`` does, without blocking a thread; see ``Awaiting.wait``."""
        return await self.awaiting.wait(result, timeout_s, propagate=propagate)

    def submit(
        self, task: ClusterTask, arguments: Iterable[Any], *, priority: int | None = None, expires: Any = None,
        countdown: float | None = None, eta: Any = None, ignore_result: bool | None = None,
    ) -> Submitted:  # fmt: skip
        """Send a job of ``task`` for each of ``arguments``, many in a message; return their results, in their order.

        Of the arguments a tuple is positional ones, a mapping named ones, and all else a single one. The options are
        those of ``apply_async``. Raises InvalidArguments, and sends nothing, if one of them cannot be right;
        PartlySubmitted, with the results of those that were sent, if not all could be.
        """
        own: ClusterTask = self.app.tasks[task.name]
        serving = [node for node in self.view.nodes() if node.accepts(own.request_type)]
        slots = sum(node.capacity.max_connections for node in serving)
        return submit(
            own, arguments, slots, priority=priority, expires=expires, countdown=countdown, eta=eta,
            ignore_result=ignore_result,
        )  # fmt: skip

    def nodes(self, where: NodeFilter = ALL) -> Sequence[Node]:
        """Return the nodes that pass ``where``, with their queue lengths. Raises UnavailableError."""
        return [node for node in self._read_nodes() if where.matches(node)]

    def where_to(self, request_type: str) -> str:
        """Return the name of the joined cluster that had better be sent a job of this type; empty: this one.

        It is this one while it has a free slot, or no other has. By views that are about a second old; a cluster whose
        registry does not answer is none to send to. Sending there is up to the caller, who needs an app for it.
        """
        seen = [ClusterNodes(name, view.nodes()) for name, view in self._joined_views.items()]
        answering = [each for each in seen if self._joined_views[each.name].answers]
        return where_to_send(request_type, self.view.nodes(), answering)

    def delayed(self, most: int = 1_000) -> Sequence[DelayedJob]:
        """Return the jobs whose time has not come, the ``most`` that are due first. Raises BrokerUnavailable."""
        return delayed_jobs(self.client, self.keys, most)

    def undecodable(self, most: int = 100) -> list[bytes]:
        """Return the messages that nobody could read, the ``most`` that came last. Raises BrokerUnavailable."""
        with foreign_errors(BrokerUnavailable, "reading what was set aside"):
            kept: Any = self.client.lrange(self.keys.undecodable, 0, most - 1)
        return list(kept)

    def drop_undecodable(self) -> int:
        """Forget them all; return how many there were. Raises BrokerUnavailable."""
        with foreign_errors(BrokerUnavailable, "dropping what was set aside"), self.client.pipeline() as pipe:
            pipe.llen(self.keys.undecodable)
            pipe.delete(self.keys.undecodable)
            return int(pipe.execute()[0])

    def watch(self, stop: Event | None = None) -> Iterator[NodeEvent]:
        """Yield joined, left and updated until ``stop`` is set; see ``Registry.watch``."""
        return self.registry.watch(stop or Event())

    def drain(self, node_id: str, epoch: str = "", *, timeout_s: float | None = None) -> Moved:
        """Place nothing new on a node and hand its list to the others; see ``Draining.drain``."""
        return self.draining.drain(node_id, epoch, timeout_s=timeout_s)

    def refuse_coordinator(self, node_id: str) -> None:
        """Raise ClusterError if a node is a coordinator: who asks for it to be drained means something else."""
        with suppress(UnavailableError):  # Nodes are drained without discovery, too.
            if any(master.id == node_id for master in self.nodes(NodeFilter(role=NodeRole.MASTER))):
                raise ClusterError(f"{node_id} is a coordinator and runs no jobs: to end it, send it SIGTERM")

    def resume(self, node_id: str) -> None:
        """Let a draining node take jobs again. Raises NodeNotFound."""
        self.draining.resume(node_id)

    def rebalance(self, most: int | None = None) -> Rebalanced:
        """Move waiting jobs from lists that are too long to nodes with room; see ``Rebalance.run``.

        ``most`` from each list, None: all that is too much. Raises UnavailableError.
        """
        rebalance = Rebalance(self.client, self.keys, self.epochs, self.events, self.settings.zone_bound)
        return rebalance.run(self._read_nodes(), most)

    def rebalance_in_turn(self) -> None:
        """Rebalance, unless another process has within ``rebalance_s``. Raises UnavailableError."""
        with foreign_errors(BrokerUnavailable, "claiming the rebalance"):
            ours = self.client.set(self.keys.rebalanced, 1, nx=True, px=int(self.settings.rebalance_s * 1000))
        if ours:
            self._rebalance_a_little()

    def optimize_collections(self) -> bool:
        """Send the job that compacts all collections, unless that was done within ``optimize_s``, or no node runs it.

        An outside engine looks after its collections itself. Returns whether it was sent. Raises UnavailableError.
        """
        job, every_s = self.app.tasks.get("retrieval.optimize"), self.settings.optimize_s
        if job is None or not every_s or self.settings.vector_url:
            return False
        if not self.nodes(NodeFilter(request_type=job.request_type)):
            return False
        # Of several coordinators one sends it.
        with foreign_errors(BrokerUnavailable, "claiming the compaction"):
            ours = self.client.set(self.keys.optimized, 1, nx=True, px=max(1, int(every_s * 900)))
        if ours:
            job.apply_async(expires=every_s)
        return bool(ours)

    def plan_shards_in_turn(self) -> None:
        """Assign shards to nodes, unless another process has just looked, or an outside engine has the collections.

        Raises UnavailableError.
        """
        if not self.settings.vector_url and self.assignments.claim("plan", self.settings.heartbeat_s / 2):
            self.shard_manager.plan()

    def eject_outliers(self, *, at_once: bool = False) -> None:
        """Take out nodes that do their jobs worse than the others; ``at_once``, or when that was not done lately.

        Raises BrokerUnavailable. While the registry is away nobody is judged.
        """
        if not self.settings.ejection:
            return
        try:
            if at_once:
                self.ejection.check()
            else:
                self.ejection.check_in_turn()
        except RegistryUnavailable as exc:
            logger.debug("nobody is judged: %s", exc)

    def check(self) -> None:
        """Raise ConfigurationError if a setting is wrong or names a strategy that does not exist."""
        settings = self.settings
        own = {name: value for name, value in settings if name.startswith("strategy") and value is not None}
        own |= {f"strategies[{request_type}]": name for request_type, name in settings.strategies.items()}
        for setting, strategy in own.items():
            try:
                create_balancer(strategy, clock=self.clock, rng=random.Random())
            except ConfigurationError as exc:
                raise ConfigurationError(f"{CONF_PREFIX}{setting}: {exc}") from None

    def release(self, queue: str = "") -> int:
        """Give all jobs back to Celery's own queues, for workers of the app without ``Cluster(app)``; return how many.

        They go to ``queue``, else to the queue that the app's own routes name. Nodes that died lately are waited for,
        and what they held is given back, too. Safe to repeat. Raises ClusterError while nodes live.
        """
        before = self.epochs.beats()
        if before:
            sleep(self.settings.lease_s)
        now = self.epochs.beats()
        if alive := sorted(node_id for node_id, beat in now.items() if before.get(node_id) != beat):
            raise ClusterError(f"nodes live, and would take the jobs: stop them first: {', '.join(alive)}")
        self.health.act([Silent(node_id, beat, self.settings.lease_s) for node_id, beat in now.items()])
        self.evacuation.move_orphans()
        self.health.tell_registry()
        return Release(self.client, self.keys, lambda headers: queue or self._own_queue(headers)).run()

    def _own_queue(self, headers: dict[str, Any]) -> str:
        amqp = self.app.amqp
        name = str(headers.get("task"))
        route = Router(amqp.routes_of_the_app, amqp.queues, True, app=self.app).route({}, name)
        return str(route["queue"].name)

    def served_types(self) -> frozenset[str]:
        """The request types this process can run: as set, else all that its tasks declare."""
        if self.settings.serves is not None:
            return self.settings.serves
        tasks = self.app.tasks.values()
        return frozenset(task.request_type for task in tasks if isinstance(task, ClusterTask))

    def checks_done(self) -> int:
        """How many health checks coordinators have run. Raises BrokerUnavailable."""
        with foreign_errors(BrokerUnavailable, "reading the number of checks"):
            return int(self.client.get(self.keys.checks) or 0)

    def stale_commits(self) -> int:
        """How many ends of jobs, and what was to follow them, were refused. Raises BrokerUnavailable."""
        with foreign_errors(BrokerUnavailable, "reading the number of stale commits"):
            return int(self.client.hget(self.keys.counters, "stale_commits") or 0)

    @property
    def _broker_url(self) -> str:
        return self.settings.broker_url.get_secret_value()

    def _open_joined(self) -> dict[str, RegistryReader]:
        settings = self.settings
        return {
            name: create_registry(
                url, broker_url=url, keys=self.keys, clock=self.clock, sentinel_master=settings.sentinel_master,
                read_only=True,
            )
            for name, url in settings.registry_join.items()
        }  # fmt: skip

    def _read_nodes(self) -> list[Node]:
        lists = self.epochs.lists()
        return [_seen_by_the_broker(node, self.keys.node_queue(node.id), lists) for node in self.registry.list()]

    def _lists(self) -> list[str]:
        """The lists that hold jobs, and the delayed jobs."""
        return [*self.epochs.lengths(), self.keys.delayed]

    def _route(
        self, name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **rest: Any
    ) -> dict[str, Any] | None:
        # By name: Celery passes no task where one is sent by its name only, and its own for map, starmap and chunks.
        routed = self.app.tasks.get(name, task)
        return self.router(
            name, args, kwargs, options, task=routed if isinstance(routed, ClusterTask) else None, **rest
        )

    def _check_health(self) -> None:
        self.health.act(self.health.observe())
        with foreign_errors(BrokerUnavailable, "placing the jobs whose time has come"):
            # A node does that when it fetches: none may be there, or all be busy, and scaling counts what waits.
            self._placer.promote()
        # Counted when it is done: checks that fail must not keep the agents from acting.
        with foreign_errors(BrokerUnavailable, "counting a check"):
            self.client.incr(self.keys.checks)

    def _rebalance_a_little(self) -> None:
        # More would keep a coordinator from its checks; what is left is moved the next time.
        self.rebalance(most=REBALANCED_AT_ONCE)

    def _check_runtime(self, sender: Any, **_: Any) -> None:
        """Refuse to start a worker with wrong settings, a wrong name, or another package for the node's runtime."""
        if sender.app is not self.app:
            return
        try:
            check_runtime()
            self.check()
            check_node_id(sender.hostname)
        except ValueError as exc:
            # Not an exception: Celery logs those of signals and goes on.
            raise SystemExit(str(exc)) from None

    def _configure(self, **_: Any) -> None:
        try:
            settings = load_settings(given_settings(self.app), os.environ)
            configure(self.app, settings)
        except ConfigurationError as exc:
            # Celery logs what a receiver raises and goes on: who asks for the settings is told.
            self._settings = exc
        else:
            self._settings = settings


def _seen_by_the_broker(node: Node, queue: str, lists: Lists) -> Node:
    """Return a node as registered with what the broker knows better: its list, and whether it drains."""
    changed: dict[str, Any] = {}
    if length := lists.lengths.get(queue, 0):
        changed["load"] = node.load.model_copy(update={"queue_length": length})
    if limit := lists.limits.get(queue):
        changed["limit"] = limit.phase
    # The node itself reports this with its next load only, and until then what it had been before.
    if queue in lists.draining:
        changed["status"] = NodeStatus.DRAINING
    elif node.status is NodeStatus.DRAINING:
        changed["status"] = NodeStatus.ONLINE
    return node.model_copy(update=changed) if changed else node
