"""Which nodes do their jobs worse than the others. Pure.

A node is only compared with others that ran the same task: where all fail alike, or are slow alike, the fault lies in
the jobs or behind them, and no node is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

from cluster_tasks.model import Recent

MIN_JOBS = 10
"""With fewer runs of a task nothing is said of a node, nor by it."""
MORE_FAILURES = 0.5
"""How far a node's share of failures must be above the median of the others."""
SURE = 4.0
"""And above what chance explains, in standard deviations: nodes are compared again and again."""
SHORTEST_SLOW_S = 0.05
"""A job that takes less is not slow, by whatever factor: it may have met a hiccup."""


@dataclass(frozen=True, slots=True)
class Record:
    """How the last jobs of a node ended, by the name of their task."""

    node_id: str
    recent: Mapping[str, Recent]


@dataclass(frozen=True, slots=True)
class Outlier:
    """A node, and what is wrong with it in words."""

    node_id: str
    reason: str


def find_outliers(records: Sequence[Record], slow_factor: float) -> list[Outlier]:
    """Return the nodes that fail, or take ``slow_factor`` times as long (0: whatever), where the others do not.

    The worst comes first, as only some of them may be taken out.
    """
    judged = [(fault, record.node_id) for record in records if (fault := _fault(record, records, slow_factor))]
    return [Outlier(node_id, reason) for (_, reason), node_id in sorted(judged, reverse=True)]


def is_slow(recent: Mapping[str, Recent], others: Sequence[Record], slow_factor: float) -> bool:
    """Whether a few jobs took ``slow_factor`` times as long as those of the others."""
    return any(_slowness(task, mine.latency_s, others, slow_factor) for task, mine in recent.items())


def others_fail(recent: Mapping[str, Recent], others: Sequence[Record]) -> bool:
    """Whether a failure among a few jobs says nothing of the node: half of those of the others fail, too."""
    shares = [_share(each) for task, mine in recent.items() if mine.failures for each in _peers(task, others)]
    return bool(shares) and median(shares) >= 1 - MORE_FAILURES


def _fault(record: Record, records: Sequence[Record], slow_factor: float) -> tuple[float, str] | None:
    others = [other for other in records if other.node_id != record.node_id]
    faults = []
    for task, mine in record.recent.items():
        if mine.jobs >= MIN_JOBS and (excess := _excess(task, mine, others)):
            faults.append((excess, f"{mine.failures} of its last {mine.jobs} runs of {task} failed, and not on others"))
        # Jobs of one task may be short and long: by the median alone, a node that met the long ones would be slow.
        is_sure = mine.jobs - mine.failures >= MIN_JOBS and _slowness(task, mine.sure_latency_s, others, slow_factor)
        if is_sure and (factor := _slowness(task, mine.latency_s, others, slow_factor)):
            faults.append((0.0, f"{task} takes {mine.latency_s:.3g} s, {factor:.0f} times as long as on others"))
    return max(faults, default=None)


def _excess(task: str, mine: Recent, others: Sequence[Record]) -> float | None:
    """By how much more of a node's jobs fail, if that is no chance."""
    # Of those that fail as often, those that have run less come last: they are less sure of it.
    peers = sorted(_peers(task, others), key=lambda peer: (_share(peer), -peer.jobs))
    if not peers:
        return None
    # The upper one of two: who is judged by a single peer, or by two that disagree, has the benefit of the doubt.
    peer = peers[len(peers) // 2]
    excess = _share(mine) - _share(peer)
    common = (mine.failures + peer.failures) / (mine.jobs + peer.jobs)
    deviation = sqrt(common * (1 - common) * (1 / mine.jobs + 1 / peer.jobs))
    return excess if excess >= MORE_FAILURES and excess >= SURE * deviation else None


def _slowness(task: str, latency_s: float, others: Sequence[Record], slow_factor: float) -> float | None:
    """By which factor jobs that take ``latency_s`` take longer than those of others, if it is too much."""
    latencies = [peer.latency_s for peer in _peers(task, others) if peer.jobs - peer.failures >= MIN_JOBS]
    if not (slow_factor and latencies and latency_s >= SHORTEST_SLOW_S):
        return None
    factor = latency_s / max(median(latencies), 1e-6)
    return factor if factor >= slow_factor else None


def _peers(task: str, others: Sequence[Record]) -> list[Recent]:
    return [peer for other in others if (peer := other.recent.get(task)) and peer.jobs >= MIN_JOBS]


def _share(recent: Recent) -> float:
    return recent.failures / recent.jobs if recent.jobs else 0.0
