"""Which nodes are dead, judged by beat counters on the observer's own clock. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.clock import Clock


@dataclass(frozen=True, slots=True)
class Silent:
    """A node whose beat counter stood still for longer than the lease."""

    node_id: str
    beat: Beat
    silent_s: float


@dataclass(slots=True)
class _Watch:
    beat: Beat
    since_s: float
    still_checks: int = 0


class Detector:
    """Observes beats and names the nodes that may be fenced.

    No wall clock takes part. Three guards protect against an observer that is itself the sick one: after a gap between
    two observations of more than half a lease it starts anew; after an outage it does so too, and gives everyone
    ``outage_s`` more, for it may be the first that Redis answers again; and while more than half of at least three
    nodes have stood still for half a lease, the silent ones are given one more lease.
    """

    def __init__(self, clock: Clock, lease_s: float, failure_threshold: int = 1, outage_s: float = 0.0) -> None:
        self._clock, self._lease_s, self._threshold, self._outage_s = clock, lease_s, failure_threshold, outage_s
        self._watches: dict[str, _Watch] = {}
        self._observed_s = 0.0
        self._interrupted = False
        self.held_back = 0
        """How many silent nodes the second guard has given more time in the last observation."""

    def interrupted(self) -> None:
        """Start anew: the observer could not see for a while, and others may not be able to beat yet."""
        # A mark, for other threads say this while one observes.
        self._interrupted = True

    def observe(self, beats: Mapping[str, Beat]) -> list[Silent]:
        """Take in the beats of all nodes as read now; return those that may be fenced, sorted by id."""
        now_s = self._clock.monotonic()
        since_s = now_s
        if self._interrupted or now_s - self._observed_s > self._lease_s / 2:
            since_s += self._outage_s if self._interrupted else 0.0
            self._interrupted = False
            self._watches.clear()
        self._observed_s = now_s
        self._watches = {node_id: self._next_watch(node_id, beat, since_s) for node_id, beat in beats.items()}
        silent = [
            Silent(node_id, watch.beat, now_s - watch.since_s)
            for node_id, watch in sorted(self._watches.items())
            if now_s - watch.since_s >= self._lease_s and watch.still_checks >= self._threshold
        ]
        # Nodes do not beat in step: those that will be silent a moment later count as well.
        still = sum(now_s - watch.since_s >= self._lease_s / 2 for watch in self._watches.values())
        is_panic = len(self._watches) >= 3 and still * 2 > len(self._watches)
        may_be_fenced = [node for node in silent if not is_panic or node.silent_s >= 2 * self._lease_s]
        self.held_back = len(silent) - len(may_be_fenced)
        return may_be_fenced

    def _next_watch(self, node_id: str, beat: Beat, since_s: float) -> _Watch:
        watch = self._watches.get(node_id)
        if watch is None or watch.beat != beat:
            return _Watch(beat, since_s)
        watch.still_checks += 1
        return watch
