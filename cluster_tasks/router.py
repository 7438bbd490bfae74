"""The Celery router: a view of the nodes, a strategy, a queue."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kombu import Queue

from cluster_tasks import tracing
from cluster_tasks.balancing import create_balancer
from cluster_tasks.balancing.base import Balancer
from cluster_tasks.balancing.zones import Zones
from cluster_tasks.broker.members import MEMBERS_HEADER
from cluster_tasks.broker.message import (
    BATCH_PROPERTY,
    REQUEST_TYPE_PROPERTY,
    SENT_AT_PROPERTY,
    STRATEGY_PROPERTY,
)
from cluster_tasks.clock import Clock
from cluster_tasks.errors import ClusterError, ConfigurationError
from cluster_tasks.keys import Keys
from cluster_tasks.model import Node, Request
from cluster_tasks.settings import ClusterSettings

logger = logging.getLogger(__name__)

STRATEGY_HEADER = "strategy"
"""``task.apply_async(…, headers={"strategy": "adaptive"})`` sets the strategy of one call."""
QUIET_AFTER_S = 5.0
WORTH_WAITING_S = 1.0


class ClusterView:
    """The nodes as last read; refreshed by a thread of its own while it is asked, survives an outage and a fork.

    ``name`` is that of a joined cluster, whose nodes are looked at; empty: of this one.
    """

    def __init__(self, read: Callable[[], Sequence[Node]], clock: Clock, snapshot_s: float, name: str = "") -> None:
        self._read, self._clock, self._snapshot_s, self._name = read, clock, snapshot_s, name
        self._nodes: tuple[Node, ...] = ()
        self._read_at_s = self._asked_at_s = float("-inf")
        self._healthy = True
        self._pid = 0
        self._refreshing = threading.Lock()
        self._wanted, self._read_again = threading.Event(), threading.Event()

    def nodes(self) -> tuple[Node, ...]:
        """Return the last view, the same object until it is read again. Never raises for an outage."""
        now_s = self._asked_at_s = self._clock.monotonic()
        if os.getpid() != self._pid:
            self._start()
        # A view that the thread has let age, because nobody asked, is worth a moment, but not the time-out of a
        # registry that hangs.
        if now_s - self._read_at_s > 2 * self._snapshot_s + 1:
            self._wanted.set()
            if self._healthy:
                self._read_again.wait(WORTH_WAITING_S)
        return self._nodes

    @property
    def answers(self) -> bool:
        """Whether the registry answered when the nodes were to be read last."""
        return self._healthy

    def refresh(self) -> None:
        """Read the nodes now; keep the last view if the registry cannot be read, for whatever reason."""
        with self._refreshing:
            try:
                self._nodes = tuple(self._read())
            except Exception as exc:
                # A wrong setting or a bug must not end the thread that reads: senders would wait for it at each job.
                bug = None if isinstance(exc, ClusterError) else exc
                if self._healthy and self._name:
                    told = "the registry of %s does not answer, so no job is sent there: %s"
                    logger.warning(told, self._name, exc, exc_info=bug)
                elif self._healthy:
                    told = "the registry does not answer, jobs are placed by the last view: %s"
                    logger.warning(told, exc, exc_info=bug)
                self._healthy = False
            else:
                if not self._healthy:
                    logger.warning("the registry%s answers again", f" of {self._name}" if self._name else "")
                self._healthy = True
            self._read_at_s = self._clock.monotonic()

    def _start(self) -> None:
        # A fork copies neither the thread nor a free lock.
        self._pid, self._refreshing = os.getpid(), threading.Lock()
        self._wanted, self._read_again = threading.Event(), threading.Event()
        threading.Thread(target=self._keep_fresh, args=(self._pid,), name="cluster-view", daemon=True).start()

    def _keep_fresh(self, pid: int) -> None:
        while os.getpid() == pid:
            self._wanted.wait(self._snapshot_s)
            if self._clock.monotonic() - self._asked_at_s < QUIET_AFTER_S:
                self.refresh()
                self._wanted.clear()
                self._read_again.set()
            else:
                self._read_again.clear()


class ClusterRouter:
    """Routes tasks that declare a request type to the list of a node; leaves all others alone."""

    def __init__(self, settings: ClusterSettings, view: ClusterView, clock: Clock, rng: random.Random) -> None:
        self._settings, self._view, self._clock, self._rng = settings, view, clock, rng
        self._keys = Keys(settings.name)
        self._lock = threading.Lock()
        # The nodes of the caller's zone and the others are two sets, each with a turn, a ring and counts of its own.
        self._balancers: dict[tuple[str, str, bool], Balancer] = {}
        self._eligible: dict[str, tuple[Node, ...]] = {}
        self._zones: dict[str, Zones] = {}
        self._seen: tuple[Node, ...] | None = None
        self._queues: dict[str, Queue] = {}
        os.register_at_fork(after_in_child=self._part_from_parent)

    def __call__(
        self, name: str, args: Any, kwargs: Any, options: Mapping[str, Any], task: Any = None, **_: Any
    ) -> dict[str, Any] | None:
        """Return the route of a job, or None if it is none of the cluster's.

        Raises ConfigurationError if the call names a strategy that does not exist.
        """
        request_type = getattr(task, "request_type", None)
        if not request_type:
            return None
        headers = options.get("headers") or {}
        # Of many jobs in one message each may have an affinity of its own: they are spread.
        is_one = not headers.get(MEMBERS_HEADER)
        affinity = task.affinity_of(args or (), kwargs or {}) if is_one else ""
        preferred = task.preferred_node(args or (), kwargs or {}) if is_one else ""
        request = Request(request_type, size=_size(args, kwargs), affinity=affinity)
        strategy = headers.get(STRATEGY_HEADER) or self._settings.strategy_for(request_type)
        if not isinstance(strategy, str):
            raise ConfigurationError(f"the header {STRATEGY_HEADER} is the name of a strategy, not {strategy!r}")
        queue = self.place(request, strategy, preferred)
        route = {"queue": self._queue(queue), REQUEST_TYPE_PROPERTY: request_type, SENT_AT_PROPERTY: self._clock.time()}
        if not options.get("queue") and not options.get("exchange"):
            # Of a queue that is to be declared Kombu makes copies at every publish, and there is nothing to declare.
            route["declare"] = []
        if batch := task.batch_of(options):
            route[BATCH_PROPERTY] = batch
        return {**route, STRATEGY_PROPERTY: strategy} if tracing.is_on() else route

    def place(self, request: Request, strategy: str, preferred: str = "") -> str:
        """Return the queue for a request: the list of a node, or the waiting list if no node can take it now.

        The node ``preferred`` is chosen before the strategy's, if it can take the request; else one of the caller's own
        zone, unless that has too much to do.
        """
        nodes = self._view.nodes()
        with self._lock:
            if nodes is not self._seen:
                self._take(nodes)
            eligible = self._eligible.get(request.type)
            if eligible is None:
                eligible = self._eligible[request.type] = tuple(n for n in nodes if n.accepts(request.type))
            # The balancer is asked all the same: it counts what it has sent.
            chosen = tuple(node for node in eligible if node.id == preferred) if preferred else ()
            near, among = self._in_zone(request.type, eligible, chosen)
            balancer = self._balancer(strategy, request.type, near)
            if not eligible:
                return self._keys.waiting_queue(request.type)
            return self._keys.node_queue(balancer.select(request, chosen or among).id)

    def _take(self, nodes: tuple[Node, ...]) -> None:
        self._seen = nodes
        self._eligible.clear()
        self._zones.clear()
        for balancer in self._balancers.values():
            balancer.update(nodes)

    def _in_zone(
        self, request_type: str, eligible: tuple[Node, ...], chosen: tuple[Node, ...]
    ) -> tuple[bool, tuple[Node, ...]]:
        """Whether a job stays in the caller's zone, and the nodes to choose from; count it as sent there."""
        if self._settings.zone is None or not eligible:
            return True, eligible
        zones = self._zones.get(request_type)
        if zones is None:
            zones = self._zones[request_type] = Zones(eligible, self._settings.zone, self._settings.zone_bound)
        near = zones.holds(chosen[0]) if chosen else zones.is_near()
        zones.count(near)
        return near, zones.near if near else zones.far

    def _balancer(self, strategy: str, request_type: str, near: bool) -> Balancer:
        balancer = self._balancers.get((strategy, request_type, near))
        if balancer is None:
            balancer = create_balancer(
                strategy, clock=self._clock, rng=self._rng, virtual_nodes=self._settings.virtual_nodes
            )
            balancer.update(self._seen or ())
            self._balancers[strategy, request_type, near] = balancer
        return balancer

    def _queue(self, name: str) -> Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = cluster_queue(name)
        return queue

    def _part_from_parent(self) -> None:
        # A forked child has the parent's lock, maybe taken, and would draw the same "random" nodes as its siblings.
        self._lock = threading.Lock()
        self._rng.seed()


def cluster_queue(name: str) -> Queue:
    """Return a queue of the cluster for Kombu. Nothing is declared: its scripts need no bindings."""
    return Queue(name, routing_key=name, no_declare=True)


def _size(args: Any, kwargs: Any) -> int:
    values = [*(args or ()), *(kwargs or {}).values()]
    return sum(len(value) for value in values if isinstance(value, str | bytes | list | tuple | dict))
