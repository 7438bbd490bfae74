"""The health check: look at all beats, fence who is dead, finish what others left undone."""

from __future__ import annotations

import logging

from cluster_tasks.broker.epochs import Beat, Ending, EpochTable, Event, Fenced
from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, RegistryUnavailable
from cluster_tasks.failover.detector import Detector, Silent
from cluster_tasks.failover.evacuation import Evacuation, Remains
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
        fenced = self._fence(*silent)
        self.finish()
        if self._checks % ORPHANS_EVERY == 0 and (moved := self._evacuation.move_orphans()):
            self._events.add("jobs moved", node="", epoch="", held=moved.held, listed=moved.listed)
            logger.warning("jobs moved that nobody owned: %d held, %d listed", moved.held, moved.listed)
        self._checks += 1
        return fenced

    def fail_over(self, node_id: str, seen: Beat, silent_s: float) -> bool:
        """Fence a node and move its work. False if it has beaten since, or another observer was first."""
        fenced = self._fence(Silent(node_id, seen, silent_s))
        self.finish()
        return fenced == 1

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

        All epochs go through each step together: many nodes may die at once, and a round trip takes long where many
        processes want to run. An epoch is forgotten last, so that each step is done and told. The registry is not asked
        for anything: it may be silent, and the next node may be dying. ``tell_registry`` is for another thread.
        """
        ended = self._epochs.fenced()
        self._evacuation.move_remains(*(Remains(one.node_id, one.epoch, self._crash(one)) for one in ended))
        events = {(one.node_id, one.epoch): self._moved(one) for one in ended}
        for one, is_forgotten in zip(ended, self._epochs.forget(events), strict=True):
            # Else another process was first, and has told.
            if is_forgotten:
                self._untold.add((one.node_id, one.epoch))
                if events[one.node_id, one.epoch]:
                    logger.warning("jobs moved from %s: %d held, %d listed", one.node_id, one.held, one.listed)

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

    def _fence(self, *silent: Silent) -> int:
        fenced = self._epochs.fence_all([(node.node_id, node.beat, self._lost(node)) for node in silent])
        for node, is_fenced in zip(silent, fenced, strict=True):
            # Else it has beaten since, or another observer was first.
            if is_fenced:
                name, seconds = node.node_id, node.silent_s
                logger.warning("node lost: %s was silent for %.1f s", name, seconds, extra={"node": name})
        return sum(fenced)

    def _lost(self, node: Silent) -> Event:
        silent_s = round(node.silent_s, 3)
        return self._events.entry("node lost", node=node.node_id, epoch=node.beat.epoch, silent_s=silent_s)

    def _crash(self, ended: Fenced) -> Crash | None:
        if ended.ending is Ending.CLOSED:
            return None
        return Crash(ended.node_id, ended.epoch, "the node was lost", self._clock.time())

    def _moved(self, ended: Fenced) -> Event:
        node_id, epoch, ending, held, listed = ended
        if ending is Ending.CLOSED and not held + listed:
            # A node that left with nothing: that it left has been told.
            return {}
        return self._events.entry("jobs moved", node=node_id, epoch=epoch, held=held, listed=listed)
