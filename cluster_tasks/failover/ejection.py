"""Ejecting nodes that do their jobs worse than the others: a breaker per node, its phases in the epoch table.

Nodes take work by themselves, so an ejected one is held by the limit that fetching and placing obey. Its jobs are told
from those before by a *trial*, which the node learns with its next fetch and reports with its load. Any number of
observers may decide at once: each step is taken only if limit and epoch are what was judged. Times are measured by each
observer on its own clock, from when it first saw a trial.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from cluster_tasks.breaker import BreakerPolicy, BreakerState, Outcome, Permit, admit, phase_of, record
from cluster_tasks.breaker import Phase as BreakerPhase
from cluster_tasks.broker.epochs import EpochTable, Limit, Phase
from cluster_tasks.clock import Clock
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.outliers import Record, find_outliers, is_slow, others_fail
from cluster_tasks.keys import Keys
from cluster_tasks.model import Node, NodeRole, NodeStatus, Recent

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
"""Loads do not come more often."""
RAMP_STEP_S = 3.0
"""A node that ramps up is given twice as many slots after so long, first a quarter of them."""
OUT = (Phase.EJECTED, Phase.HALF_OPEN, Phase.PROBING)


@dataclass(slots=True)
class _Watch:
    """What this observer knows of a trial."""

    trial: str
    state: BreakerState
    since_s: float
    """When it first saw the number of slots of now."""
    slots: int
    probes: int = 0
    failures: int = 0
    successes: int = 0


class Ejection:
    """One observer. ``read_nodes`` returns the nodes as registered. Raises UnavailableError."""

    def __init__(
        self, epochs: EpochTable, evacuation: Evacuation, events: EventLog, keys: Keys, clock: Clock,
        policy: BreakerPolicy, slow_factor: float, read_nodes: Callable[[], Sequence[Node]],
    ) -> None:  # fmt: skip
        self._epochs, self._evacuation, self._events, self._keys = epochs, evacuation, events, keys
        self._clock, self._policy, self._slow_factor, self._read_nodes = clock, policy, slow_factor, read_nodes
        self._watches: dict[str, _Watch] = {}
        self._checked_s = float("-inf")
        self._checking = Lock()

    def check_in_turn(self) -> None:
        """Check, unless that was done within the last second."""
        if self._clock.monotonic() - self._checked_s >= CHECK_EVERY_S:
            self.check()

    def check(self) -> None:
        """Eject outliers, and lead those that were ejected on to the next phase. Safe to run anywhere at once."""
        if not self._checking.acquire(blocking=False):
            return
        try:
            self._checked_s = self._clock.monotonic()
            self._check()
        finally:
            self._checking.release()

    def _check(self) -> None:
        limits = self._epochs.lists().limits
        nodes = {
            node.id: node
            for node in self._read_nodes()
            if NodeRole.WORKER in node.roles and node.status in (NodeStatus.ONLINE, NodeStatus.BUSY)
        }
        found = {node_id: limits.get(self._keys.node_queue(node_id)) for node_id in nodes}
        # What a node reports may still be of the time before its limit was set, or lifted.
        reported = {
            node_id: node.load.recent if node.load.trial == _trial(found[node_id]) else {}
            for node_id, node in nodes.items()
        }
        compared = [
            Record(node_id, reported[node_id])
            for node_id, limit in found.items()
            if limit is None or limit.phase is Phase.RAMPING
        ]
        self._watches = {node_id: watch for node_id, watch in self._watches.items() if found.get(node_id)}
        self._release_more_than_half(nodes, found)
        for node_id, limit in found.items():
            if limit is not None and limit.phase is not Phase.RECOVERING:
                self._lead_on(nodes[node_id], limit, reported[node_id], compared)
        for outlier in find_outliers(compared, self._slow_factor):
            self._eject(nodes[outlier.node_id], found[outlier.node_id], outlier.reason, if_half_stay=True)

    def _eject(self, node: Node, seen: Limit | None, reason: str, *, if_half_stay: bool | None) -> None:
        # Random: a trial must not be taken for an earlier one.
        limit = Limit(0, Phase.EJECTED, secrets.token_hex(4))
        if not self._epochs.limit(node.id, node.epoch, seen, limit, if_half_stay=if_half_stay):
            return
        self._watch_of(node, limit, self._clock.monotonic())
        self._evacuation.hand_over_unbound(node.id)
        if seen is None or seen.phase is Phase.RAMPING:
            logger.warning("node %s is ejected: %s", node.id, reason, extra={"node": node.id})
            self._events.add("breaker open", node=node.id, reason=reason)

    def _lead_on(self, node: Node, limit: Limit, recent: Mapping[str, Recent], compared: Sequence[Record]) -> None:
        now_s = self._clock.monotonic()
        watch = self._watch_of(node, limit, now_s)
        if limit.phase is Phase.RAMPING:
            # Judged like all others beside that.
            if now_s - watch.since_s >= RAMP_STEP_S:
                self._ramp_up(node, limit, limit.slots * 2)
            return
        others = [other for other in compared if other.node_id != node.id]
        if phase_of(watch.state, self._policy, now_s) is BreakerPhase.HALF_OPEN:
            watch.state = self._judge(watch, recent, others, now_s)
            if watch.state.opened_at_s is None:
                self._ramp_up(node, limit, -(-node.capacity.max_connections // 4))
            elif watch.state.opened_at_s == now_s:
                self._eject(node, limit, "a probe failed", if_half_stay=None)
            else:
                self._probe(node, limit, watch, now_s)

    def _watch_of(self, node: Node, limit: Limit, now_s: float) -> _Watch:
        watch = self._watches.get(node.id)
        if watch is None or watch.trial != limit.trial:
            # Who sees a later phase first goes on from there.
            opened_at_s = now_s if limit.phase is Phase.EJECTED else now_s - self._policy.timeout_s
            watch = _Watch(limit.trial, BreakerState(opened_at_s=opened_at_s), now_s, limit.slots)
        elif limit.phase is Phase.RAMPING and watch.slots != limit.slots:
            watch.since_s, watch.slots = now_s, limit.slots
        self._watches[node.id] = watch
        return watch

    def _judge(
        self, watch: _Watch, recent: Mapping[str, Recent], others: Sequence[Record], now_s: float
    ) -> BreakerState:
        """Take in the probes that have ended since the last look."""
        failures = sum(each.failures for each in recent.values())
        successes = sum(each.jobs for each in recent.values()) - failures
        failure = Outcome.UNKNOWN if others_fail(recent, others) else Outcome.FAILURE
        success = Outcome.FAILURE if is_slow(recent, others, self._slow_factor) else Outcome.SUCCESS
        ended = [failure] * (failures - watch.failures) + [success] * (successes - watch.successes)
        state = watch.state
        for outcome in ended:
            lease = state.leases[0] if state.leases else None
            state = record(state, self._policy, now_s, Permit(watch.state.generation, lease), outcome)
        watch.failures, watch.successes = failures, successes
        return state

    def _probe(self, node: Node, limit: Limit, watch: _Watch, now_s: float) -> None:
        """Let the node have one more job, if none is under way."""
        if limit.probes != watch.probes:
            # It was taken, maybe long after it was offered: its lease begins when that is seen.
            watch.probes = limit.probes
            watch.state, _ = admit(replace(watch.state, leases=()), self._policy, now_s)
        is_leased = any(until_s > now_s for until_s in watch.state.leases)
        if limit.phase is Phase.HALF_OPEN or (is_leased and watch.failures + watch.successes < limit.probes):
            return
        self._epochs.limit(node.id, node.epoch, limit, replace(limit, slots=1, phase=Phase.HALF_OPEN))

    def _ramp_up(self, node: Node, limit: Limit, slots: int) -> None:
        wanted = None
        if slots < node.capacity.max_connections:
            wanted = Limit(slots, Phase.RAMPING, limit.trial)
        if self._epochs.limit(node.id, node.epoch, limit, wanted) and wanted is None:
            logger.warning("node %s is back", node.id, extra={"node": node.id})
            self._events.add("breaker closed", node=node.id)

    def _release_more_than_half(self, nodes: Mapping[str, Node], found: dict[str, Limit | None]) -> None:
        """Let nodes back in, where others have gone since and too few are left."""
        for node_id, limit in sorted(found.items()):
            if limit is None or limit.phase not in OUT:
                continue
            if self._epochs.limit(node_id, nodes[node_id].epoch, limit, None, if_half_stay=False):
                logger.warning("node %s is let in again: too few others are left", node_id, extra={"node": node_id})
                self._events.add("breaker closed", node=node_id, reason="too few others are left")
                found[node_id] = None


def _trial(limit: Limit | None) -> str:
    return "" if limit is None or limit.phase is Phase.RECOVERING else limit.trial
