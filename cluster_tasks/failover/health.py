"""The health check: look at all beats, fence who is dead, finish what others left undone."""

from __future__ import annotations

import logging

from cluster_tasks.broker.epochs import Beat, Ending, EpochTable, Fenced
from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, RegistryUnavailable
from cluster_tasks.failover.detector import Detector, Silent
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.failover.events import EventLog
from cluster_tasks.registry.base import Registry

logger = logging.getLogger(__name__)

ORPHANS_EVERY = 20
"""Checks between two searches for orphans, which walk over keys."""


class HealthCheck:
    """One observer. Coordinators run it when beat says so, agents when no coordinator does; no leader is needed."""

    def __init__(
        self,
        epochs: EpochTable,
        detector: Detector,
        evacuation: Evacuation,
        registry: Registry,
        events: EventLog,
        clock: Clock,
    ) -> None:
        self._clock, self._epochs, self._detector, self._evacuation = clock, epochs, detector, evacuation
        self._registry, self._events = registry, events
        self._checks = 0
        self._panic = events.condition("panic guard", "panic guard over")

    def observe(self) -> list[Silent]:
        """Read the beats; return who may be fenced. Raises BrokerUnavailable, and then starts its observation anew."""
        try:
            beats = self._epochs.beats()
            silent = self._detector.observe(beats)
            if held_back := self._detector.held_back:
                self._panic.holds(silent=held_back, nodes=len(beats))
            else:
                self._panic.is_over()
        except BrokerUnavailable:
            self._detector.interrupted()
            raise
        return silent

    def interrupted(self) -> None:
        """Start the observation anew: this process could not write, so others may be unable to beat."""
        self._detector.interrupted()

    def act(self, silent: list[Silent]) -> int:
        """Fence these nodes, move their work and whatever else has no owner; return how many were fenced."""
        # All fences first: they are quick, and what one node leaves behind must not let the others run on.
        fenced = sum(self._fence(node.node_id, node.beat, node.silent_s) for node in silent)
        self.finish()
        if self._checks % ORPHANS_EVERY == 0 and (moved := self._evacuation.move_orphans()):
            self._events.add("jobs moved", node="", epoch="", held=moved.held, listed=moved.listed)
            logger.warning("jobs moved that nobody owned: %d held, %d listed", moved.held, moved.listed)
        self._checks += 1
        return fenced

    def fail_over(self, node_id: str, seen: Beat, silent_s: float) -> bool:
        """Fence a node and move its work. False if it has beaten since, or another observer was first."""
        fenced = self._fence(node_id, seen, silent_s)
        self.finish()
        return fenced

    def retire(self, node_id: str, epoch: str) -> bool:
        """End the epoch of a node that leaves in good order and give back what it holds; False if it had ended."""
        closed = self._epochs.close(node_id, epoch, self._events.entry("node left", node=node_id, epoch=epoch))
        self.finish()
        return closed

    def finish(self) -> None:
        """Do what is left of every epoch that has ended, whoever ended it and died on the way. Safe to repeat.

        Jobs first, for the registry may hang; an epoch is forgotten last, so that each step is done and told.
        """
        ended = self._epochs.fenced()
        for epoch in ended:
            self._evacuation.move_remains(epoch.node_id, epoch.epoch, self._crash(epoch))
        for epoch in ended:
            self._deregister(epoch.node_id, epoch.epoch)
            self._forget(epoch)

    def reap(self) -> None:
        """Let the registry forget the nodes whose epochs do not stand. Raises UnavailableError.

        It learns of a failover at once; this is for one that was left undone, or done while it did not answer.
        """
        registered = self._registry.list()
        # Read later: what was registered before had begun before.
        standing = self._epochs.beats()
        for node in registered:
            beat = standing.get(node.id)
            if beat is None or beat.epoch != node.epoch:
                self._registry.deregister(node.id, node.epoch)

    def _fence(self, node_id: str, seen: Beat, silent_s: float) -> bool:
        event = self._events.entry("node lost", node=node_id, epoch=seen.epoch, silent_s=round(silent_s, 3))
        if not self._epochs.fence(node_id, seen, event):
            return False
        logger.warning("node lost: %s was silent for %.1f s", node_id, silent_s, extra={"node": node_id})
        return True

    def _crash(self, ended: Fenced) -> Crash | None:
        if ended.ending is Ending.CLOSED:
            return None
        return Crash(ended.node_id, ended.epoch, "the node was lost", self._clock.time())

    def _forget(self, ended: Fenced) -> None:
        node_id, epoch, ending, held, listed = ended
        if ending is Ending.CLOSED and not held + listed:
            # A node that left with nothing: that it left has been told.
            self._epochs.forget(node_id, epoch)
            return
        event = self._events.entry("jobs moved", node=node_id, epoch=epoch, held=held, listed=listed)
        if self._epochs.forget(node_id, epoch, event):
            logger.warning("jobs moved from %s: %d held, %d listed", node_id, held, listed)

    def _deregister(self, node_id: str, epoch: str) -> None:
        try:
            self._registry.deregister(node_id, epoch)
        except RegistryUnavailable as exc:
            # Its work is safe, and ``reap`` will tell.
            logger.warning("the registry could not be told that %s is gone: %s", node_id, exc)
