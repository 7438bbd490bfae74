"""The health check: look at all beats, fence who is dead, finish what others left undone."""

from __future__ import annotations

import logging

from cluster_tasks.broker.epochs import Beat, Ending, EpochTable
from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, RegistryUnavailable
from cluster_tasks.failover.detector import Detector, Silent
from cluster_tasks.failover.evacuation import Evacuation, Moved
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
        fenced = sum(self.fail_over(node.node_id, node.beat, node.silent_s) for node in silent)
        for node_id, epoch, ending in self._epochs.fenced():
            self._moved(
                node_id, epoch, self._evacuation.move_remains(node_id, epoch, self._crash(node_id, epoch, ending))
            )
        if self._checks % ORPHANS_EVERY == 0 and (moved := self._evacuation.move_orphans()):
            self._moved("", "", moved)
        self._checks += 1
        return fenced

    def fail_over(self, node_id: str, seen: Beat, silent_s: float) -> bool:
        """Fence a node and move its work. False if it has beaten since, or another observer was first."""
        if not self._epochs.fence(node_id, seen):
            return False
        logger.warning("node lost: %s was silent for %.1f s", node_id, silent_s, extra={"node": node_id})
        self._events.add("node lost", node=node_id, epoch=seen.epoch, silent_s=round(silent_s, 3))
        crash = self._crash(node_id, seen.epoch, Ending.LOST)
        self._moved(node_id, seen.epoch, self._evacuation.move_remains(node_id, seen.epoch, crash))
        self._forget(node_id, seen.epoch)
        return True

    def _crash(self, node_id: str, epoch: str, ending: Ending) -> Crash | None:
        if ending is Ending.CLOSED:
            return None
        return Crash(node_id, epoch, "the node was lost", self._clock.time())

    def _moved(self, node_id: str, epoch: str, moved: Moved) -> None:
        self._events.add("jobs moved", node=node_id, epoch=epoch, held=moved.held, listed=moved.listed)
        logger.warning("jobs moved from %s: %d held, %d listed", node_id or "nobody", moved.held, moved.listed)

    def _forget(self, node_id: str, epoch: str) -> None:
        try:
            self._registry.deregister(node_id, epoch)
        except RegistryUnavailable as exc:
            # Its work is safe; the registry learns of it by its own time-out.
            logger.warning("the registry could not be told that %s is gone: %s", node_id, exc)
