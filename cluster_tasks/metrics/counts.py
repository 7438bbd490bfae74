"""How jobs end on the nodes: counted in each node's process, and told to Redis in batches, each of which counts once.

No job costs a round trip for this. What a node has counted since its last batch, up to a heartbeat, is lost if it is
killed. The sums of the cluster are numbers of their own: no node takes its share with it when it goes.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, chain
from threading import Lock
from typing import Any

import redis

from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets of all histograms, from embeddings to long answers. A last one has no bound."""
NODE_LIVES_S = 24 * 3600
"""For so long the numbers of a node that is silent are kept: one that comes back goes on counting."""
RETOLD_S = 60.0
"""So often what a node holds is told, although it is the same."""
_BOUNDS = (*(f"{bound_s:g}" for bound_s in BUCKETS_S), "inf")


class Outcome(StrEnum):
    """How a job ended on a node."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    """It failed, and is tried again."""
    REPLACED = "replaced"
    """It raised Ignore: as a rule others were sent in its place."""
    REVOKED = "revoked"
    """It was revoked, or had expired."""
    QUARANTINED = "quarantined"
    REFUSED = "refused"
    """Its end was not committed: the job had ended elsewhere, or belonged to others."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took, by buckets."""

    counts: tuple[int, ...] = (0,) * len(_BOUNDS)
    """How many fell into each bucket by itself; the last one has no bound."""
    sum_s: float = 0.0

    def cumulated(self) -> list[tuple[str, int]]:
        """Upper bounds, as Prometheus writes them, and how many took no longer."""
        bounds = (*(str(bound_s) for bound_s in BUCKETS_S), "+Inf")
        return list(zip(bounds, accumulate(self.counts), strict=True))


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How the jobs of one request type ended, and how long they took."""

    outcomes: Mapping[str, int] = field(default_factory=dict)
    """How many by outcome, those that were there."""
    run: Histogram = Histogram()
    """From their start to their end."""
    wait: Histogram = Histogram()
    """From when they were sent, or due, to their start; by the clocks of two hosts."""
    held: int = 0
    """How many the node runs or has reserved, as it told last."""


class Counts:
    """What a process has counted and not told. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._unsent: Counter[str] = Counter()

    def ended(
        self, request_type: str, outcome: Outcome, run_s: float | None = None, wait_s: float | None = None
    ) -> None:
        """Count a job that ended; one that did not run has neither run nor waited."""
        with self._lock:
            self._unsent[f"{request_type} ended {outcome}"] += 1
            for what, seconds in (("run", run_s), ("wait", wait_s)):
                if seconds is not None:
                    self._unsent[f"{request_type} {what} {_BOUNDS[bisect_left(BUCKETS_S, seconds)]}"] += 1
                    self._unsent[f"{request_type} {what} us"] += int(seconds * 1e6)

    def take(self) -> Counter[str]:
        """Return what was counted since the last time; whoever takes it tells it."""
        with self._lock:
            taken, self._unsent = self._unsent, Counter()
        return taken


class Teller:
    """Tells Redis what a node has counted and what it holds. One thread uses it."""

    def __init__(self, client: redis.Redis, keys: Keys, node_id: str, counts: Counts) -> None:
        self._counts, self._names = counts, [keys.job_counts, keys.node_counts(node_id)]
        self._node_id, self._script = node_id, load_script(client, __package__, "count")
        self._process, self._number = secrets.token_hex(6), 0
        self._batch: Counter[str] = Counter()
        """What Redis may have been told, and has not acknowledged."""
        self._types: set[str] = set()
        self._told: Mapping[str, int] = {}
        self._told_s = float("-inf")

    def tell(self, held: Mapping[str, int], now_s: float) -> None:
        """Tell what there is to tell; ``held``: jobs that the node holds by request type.

        Raises BrokerUnavailable; then the same is told the next time, and counts once all the same.
        """
        if not self._batch:
            self._batch, self._number = self._counts.take(), self._number + 1
        self._types |= held.keys()
        holds = {kind: held.get(kind, 0) for kind in self._types}
        if not self._batch and holds == self._told and now_s - self._told_s < RETOLD_S:
            return
        counted = [part for name, number in self._batch.items() for part in (name, number)]
        arguments: list[str | int] = [f"{self._process} {self._number}", NODE_LIVES_S, len(self._batch), *counted]
        arguments += chain(*((f"{kind} held", number) for kind, number in holds.items()))
        self._told = {}
        with foreign_errors(BrokerUnavailable, f"telling what {self._node_id} has counted"):
            is_news = self._script(self._names, arguments)
        self._batch = Counter()
        if is_news:
            self._told, self._told_s = holds, now_s


def read_counts(stored: Mapping[Any, Any]) -> dict[str, JobCounts]:
    """Return what the hash of a node, or of the cluster, says, by request type. What is no counter is passed over."""
    by_type: dict[str, dict[tuple[str, str], int]] = {}
    for name, number in stored.items():
        kind, _, what = text(name).partition(" ")
        if what:
            measure, _, key = what.partition(" ")
            by_type.setdefault(kind, {})[measure, key] = int(number)
    return {kind: _job_counts(numbers) for kind, numbers in sorted(by_type.items())}


def _job_counts(numbers: Mapping[tuple[str, str], int]) -> JobCounts:
    return JobCounts(
        outcomes={key: number for (measure, key), number in sorted(numbers.items()) if measure == "ended"},
        run=_histogram("run", numbers), wait=_histogram("wait", numbers), held=numbers.get(("held", ""), 0),
    )  # fmt: skip


def _histogram(what: str, numbers: Mapping[tuple[str, str], int]) -> Histogram:
    counts = [0] * len(_BOUNDS)
    for (measure, bound), number in numbers.items():
        if measure == what and bound != "us":
            # Of a release with other buckets: into the one of ours that its bound lies in.
            counts[bisect_left(BUCKETS_S, float(bound))] += number
    return Histogram(tuple(counts), numbers.get((what, "us"), 0) / 1e6)
