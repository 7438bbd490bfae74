"""Nodes that take nothing new, for a while or for good."""

from __future__ import annotations

import logging
from time import sleep
from typing import NamedTuple

import redis

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, ClusterError, NodeNotFound, UnavailableError
from cluster_tasks.failover.evacuation import Evacuation, Moved
from cluster_tasks.failover.events import EventLog
from cluster_tasks.keys import Keys
from cluster_tasks.model import NodeStatus
from cluster_tasks.redis_store import foreign_errors, text
from cluster_tasks.registry.base import Registry

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1


class Remaining(NamedTuple):
    """How an epoch that drains stands."""

    held: int
    """Jobs that it runs or has reserved; 0 if it has ended."""
    drains: bool


class Draining:
    """Drains nodes, hands back what they run, and lets them leave. Raises UnavailableError."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        clock: Clock,
        epochs: EpochTable,
        evacuation: Evacuation,
        registry: Registry,
        events: EventLog,
    ) -> None:
        self._client, self._keys, self._clock, self._epochs = client, keys, clock, epochs
        self._evacuation, self._registry, self._events = evacuation, registry, events

    def drain(self, node_id: str, epoch: str = "", *, timeout_s: float | None = None) -> Moved:
        """Place nothing new on a node and hand its list to the others; what it runs goes on.

        With ``timeout_s`` (``inf``: without end) it also waits until the node holds nothing, and hands back what it
        holds when the time is over. Raises NodeNotFound if ``epoch`` ('': any) of it does not stand, ClusterError if
        it is resumed meanwhile.
        """
        self._set_draining(node_id, True, epoch)
        moved = self._evacuation.hand_over(node_id)
        self._events.add("node draining", node=node_id, listed=moved.listed)
        beat = self._epochs.beats().get(node_id)
        if timeout_s is None or beat is None or self._wait_until_quiet(node_id, beat.epoch, timeout_s):
            return moved
        return moved + self.hand_back(node_id, beat.epoch)

    def hand_back(self, node_id: str, epoch: str) -> Moved:
        """Take from a draining node what it holds, and let others run it. Nobody is charged. Safe to repeat.

        What the node has begun of it is not committed any more; see the setting ``on_fenced``.
        """
        moved = self._evacuation.hand_back(node_id, epoch)
        if moved:
            self._events.add("jobs handed back", node=node_id, epoch=epoch, held=moved.held)
        return moved

    def remaining(self, node_id: str, epoch: str) -> Remaining:
        """Return how much an epoch of a node still holds, and whether nothing new is placed on it."""
        queue = self._keys.node_queue(node_id)
        with foreign_errors(BrokerUnavailable, f"waiting for {node_id}"), self._client.pipeline() as pipe:
            pipe.hlen(self._keys.unacked(node_id, epoch))
            pipe.hget(self._keys.epochs, queue)
            pipe.sismember(self._keys.draining, queue)
            held, standing, drains = pipe.execute()
        return Remaining(int(held) if text(standing or b"") == epoch else 0, bool(drains))

    def resume(self, node_id: str) -> None:
        """Let a draining node take jobs again. Raises NodeNotFound."""
        self._set_draining(node_id, False)
        self._events.add("node resumed", node=node_id)

    def _wait_until_quiet(self, node_id: str, epoch: str, timeout_s: float) -> bool:
        """Whether a draining node came to hold nothing in time, or left. Raises ClusterError if it is resumed."""
        until_s = self._clock.monotonic() + timeout_s
        while (remaining := self.remaining(node_id, epoch)).held:
            if not remaining.drains:
                raise ClusterError(f"{node_id} was resumed before it had ended what it runs")
            if (left_s := until_s - self._clock.monotonic()) <= 0:
                return False
            sleep(min(left_s, LOOK_EVERY_S))
        return True

    def _set_draining(self, node_id: str, draining: bool, epoch: str = "") -> None:
        self._epochs.set_draining(node_id, draining, epoch)
        try:
            self._registry.set_status(node_id, NodeStatus.DRAINING if draining else NodeStatus.ONLINE)
        except (UnavailableError, NodeNotFound) as exc:
            # The epoch table refuses jobs already; the node reports its status with its next load.
            logger.warning(
                "the registry does not show yet that %s %s: %s", node_id, "drains" if draining else "is back", exc
            )
