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
"""Checks between two searches for orphans: there are hardly ever any."""


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
        self._untold: set[tuple[str, str]] = set()
        """Node id and epoch of failovers that this process has finished, and the registry does not know of."""
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
        """End the epoch of a node that leaves in good order and give back what it holds; False if it had ended.

        The registry is told at once: this process is about to end.
        """
        closed = self._epochs.close(node_id, epoch, self._events.entry("node left", node=node_id, epoch=epoch))
        self.finish()
        self._untold.add((node_id, epoch))
        self.tell_registry()
        return closed

    def finish(self) -> None:
        """Do what is left of every epoch that has ended, whoever ended it and died on the way. Safe to repeat.

        An epoch is forgotten last, so that each step is done and told. The registry is not asked for anything: it may
        be silent, and the next node may be dying. ``tell_registry`` is for another thread.
        """
        for ended in self._epochs.fenced():
            self._evacuation.move_remains(ended.node_id, ended.epoch, self._crash(ended))
            if self._forget(ended):
                self._untold.add((ended.node_id, ended.epoch))

    def tell_registry(self) -> None:
        """Deregister the nodes whose failovers this process has finished, until the registry does not answer."""
        for node_id, epoch in list(self._untold):
            self._untold.discard((node_id, epoch))
            try:
                self._registry.deregister(node_id, epoch)
            except RegistryUnavailable as exc:
                # Its work is safe, and ``reap`` will tell.
                logger.warning("the registry could not be told that %s is gone: %s", node_id, exc)
                return

    def reap(self) -> None:
        """Let the registry forget the nodes whose epochs do not stand. Raises UnavailableError.

        ``tell_registry`` is sooner; this is for what was finished by a process that died, or while it did not answer.
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

    def _forget(self, ended: Fenced) -> bool:
        """Whether this process is the one that has finished it."""
        node_id, epoch, ending, held, listed = ended
        if ending is Ending.CLOSED and not held + listed:
            # A node that left with nothing: that it left has been told.
            return self._epochs.forget(node_id, epoch)
        event = self._events.entry("jobs moved", node=node_id, epoch=epoch, held=held, listed=listed)
        if not self._epochs.forget(node_id, epoch, event):
            return False
        logger.warning("jobs moved from %s: %d held, %d listed", node_id, held, listed)
        return True
