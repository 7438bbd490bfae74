"""The node agent: registers a node, beats for it, reports its load, watches the others, and leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.epochs import Beat, Predecessor, Standing
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import NodeNameTaken, NodeNotFound, UnavailableError
from cluster_tasks.model import Load, Node, NodeStatus
from workers.heartbeat import HeartbeatProcess
from workers.periodic import Periodic

logger = logging.getLogger(__name__)

UNCHECKED_S = 1.0
"""After so long without a health check by a coordinator, the agents act on what they see."""


class NodeAgent:
    """Keeps one node alive in the eyes of the cluster. ``deliveries`` is None for a coordinator: it takes no jobs."""

    def __init__(
        self,
        cluster: Cluster,
        node: Node,
        deliveries: Deliveries | None,
        measure: Callable[[], Load],
        helper: HeartbeatProcess | None = None,
    ) -> None:
        """``helper`` beats as well, for a pool that can hold the GIL of this process."""
        self._helper = helper
        self._cluster, self._node, self._deliveries, self._measure = cluster, node, deliveries, measure
        self._settings = cluster.settings
        self._standing = Standing.OK
        self._checks = (-1, 0.0)
        self._duties = [
            Periodic("heartbeat", self._settings.heartbeat_s, self._beat),
            Periodic("load report", self._settings.heartbeat_s, self._report),
            Periodic("watch", self._settings.health_check_s, self._watch),
        ]

    @property
    def node(self) -> Node:
        """The node as registered; its epoch is empty before ``start``."""
        return self._node

    def start(self) -> None:
        """Join the cluster. Raises NodeNameTaken if a node of this name lives, BrokerUnavailable."""
        self._begin(self._open())
        for duty in self._duties:
            duty.start()

    def drain(self) -> None:
        """Take no new jobs, and hand over the list; what is held goes on. Safe to repeat."""
        if not self._node.epoch:
            return
        self._standing = Standing.DRAINING
        try:
            # By epoch: the name may belong to a successor by now.
            self._cluster.drain(self._node.id, self._node.epoch)
        except NodeNotFound:
            logger.warning("this node was fenced: others have its list already")

    def stop(self) -> None:
        """Leave: end the epoch, give back what is still held, uncharged. Safe to repeat, and before ``start``."""
        for duty in self._duties:
            duty.stop()
        if self._helper is not None:
            self._helper.stop()
        epoch, self._node = self._node.epoch, self._node.model_copy(update={"epoch": ""})
        if not epoch:
            return
        if self._deliveries is not None:
            self._deliveries.flush()
        self._cluster.retire(self._node.id, epoch)

    def _open(self) -> str:
        epochs, node = self._cluster.epochs, self._node
        while True:
            opened = epochs.open(node.id, node.serves)
            if not isinstance(opened, Predecessor):
                return opened
            logger.warning("waiting whether an earlier %s still lives", node.id)
            self._wait_for_silence(opened.beat)
            self._cluster.health.fail_over(node.id, opened.beat, self._settings.lease_s)

    def _wait_for_silence(self, seen: Beat) -> None:
        """Wait for a lease without a beat of a predecessor. Raises NodeNameTaken if it beats."""
        clock = self._cluster.clock
        until_s = clock.monotonic() + self._settings.lease_s
        while clock.monotonic() < until_s:
            time.sleep(self._settings.heartbeat_s / 4)
            beat = self._cluster.epochs.beats().get(self._node.id)
            if beat is None:
                return
            if beat != seen:
                raise NodeNameTaken(
                    f"a node {self._node.id!r} is alive; give this worker another name with -n, such as -n NAME2@%h"
                )

    def _begin(self, epoch: str) -> None:
        self._node = self._node.model_copy(update={"epoch": epoch, "registered_at": self._cluster.clock.time()})
        self._standing = Standing.OK
        if self._deliveries is not None:
            self._deliveries.begin(epoch)
        if self._helper is not None:
            self._helper.beat_for(epoch)
        try:
            self._cluster.registry.register(self._node)
        except UnavailableError as exc:
            # The epoch table has us, so we work; the load report registers us when the registry answers.
            logger.warning("not registered yet: %s", exc)

    def _beat(self) -> None:
        was_draining = self._standing is Standing.DRAINING
        self._standing = self._cluster.epochs.beat(self._node.id, self._node.epoch)
        if self._standing is Standing.FENCED:
            self._rejoin()
            if was_draining:
                self.drain()
        if self._deliveries is not None:
            self._deliveries.flush()

    def _rejoin(self) -> None:
        logger.error("this node was fenced: what it runs will not be committed; it joins anew")
        opened = self._cluster.epochs.open(self._node.id, self._node.serves)
        if isinstance(opened, Predecessor):
            logger.error("another worker has taken the name %s: this one takes no more jobs", self._node.id)
            return
        self._begin(opened)

    def _report(self) -> None:
        load, status = self._measure(), self._status()
        try:
            self._cluster.registry.beat(self._node.id, load, status)
        except NodeNotFound:
            node = self._node.model_copy(update={"load": load, "status": status})
            self._cluster.registry.register(node)

    def _status(self) -> NodeStatus:
        if self._standing is Standing.DRAINING:
            return NodeStatus.DRAINING
        if self._deliveries is not None and self._deliveries.free_slots() <= 0:
            return NodeStatus.BUSY
        return NodeStatus.ONLINE

    def _watch(self) -> None:
        health, clock = self._cluster.health, self._cluster.clock
        silent = health.observe()
        checks = self._cluster.checks_done()
        if checks != self._checks[0]:
            self._checks = (checks, clock.monotonic())
        elif clock.monotonic() - self._checks[1] >= UNCHECKED_S:
            health.act(silent)
