"""What came of the demo: counted from the record and from the results, and judged by the promises."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from rich import box
from rich.table import Table

from workers.demo.record import Entry

REOWNED_WITHIN_S = 5.0

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Loss:
    """The end of the killed node. Durations are in seconds since the kill; None: it was not seen."""

    node: str | None = None
    held: int = 0
    """Jobs that it ran or that were in its list when it was killed."""
    detected_after_s: float | None = None
    reowned_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Repetition:
    """What it was to send the same jobs twice, in jobs per second."""

    jobs: int
    first_per_s: float
    second_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a demo; its fields are what ``--json`` prints."""

    jobs: int
    succeeded: int
    failed: int
    lost: int
    """Jobs that were accepted and came to no end."""
    executed_twice: int
    """Jobs of which an execution was repeated, as those that the killed node ran must be."""
    committed_twice: int
    killed_node: str | None
    held_by_killed_node: int
    detected_after_s: float | None
    reowned_after_s: float | None
    throughput_per_s: float
    latency_p50_s: float
    latency_p99_s: float
    jobs_by_node: Mapping[str, int]
    strategy: str
    repetition: Repetition | None
    """None: without a cache."""

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    def broken(self) -> Iterator[str]:
        """Yield the promises that were not kept, in words."""
        if self.lost:
            yield f"{self.lost} jobs were lost"
        if self.failed:
            yield f"{self.failed} jobs failed"
        if self.committed_twice:
            yield f"{self.committed_twice} jobs were committed twice"
        if not self.held_by_killed_node:
            yield "no node was killed while it held jobs: there were too few"
        elif self.reowned_after_s is None:
            yield "the jobs of the killed node were not given to others"
        elif self.reowned_after_s > REOWNED_WITHIN_S:
            yield f"the jobs of the killed node had new owners only after {self.reowned_after_s:.1f} s"


def report(
    states: Mapping[str, str],
    accepted: Sequence[Entry],
    executed: Iterable[Entry],
    committed: Sequence[Entry],
    loss: Loss,
    strategy: str,
    repetition: Repetition | None,
) -> Report:
    """Count. ``states`` are Celery's states of the accepted jobs, by id."""
    ends = {entry.job_id: entry for entry in reversed(committed)}
    latencies = [ends[entry.job_id].at_s - entry.at_s for entry in accepted if entry.job_id in ends]
    by_state = Counter(states.values())
    succeeded, failed = by_state["SUCCESS"], by_state["FAILURE"]
    nodes = Counter(ends[job_id].node for job_id in states if job_id in ends)
    return Report(
        jobs=len(states),
        succeeded=succeeded,
        failed=failed,
        lost=len(states) - succeeded - failed,
        executed_twice=len({job for job, _ in _repeated((entry.job_id, entry.attempt) for entry in executed)}),
        committed_twice=len(_repeated(entry.job_id for entry in committed)),
        killed_node=loss.node,
        held_by_killed_node=loss.held,
        detected_after_s=loss.detected_after_s,
        reowned_after_s=loss.reowned_after_s,
        throughput_per_s=round(len(latencies) / _span_s(accepted, committed), 1) if latencies else 0.0,
        latency_p50_s=round(_percentile(latencies, 50), 3),
        latency_p99_s=round(_percentile(latencies, 99), 3),
        jobs_by_node=dict(sorted(nodes.items())),
        strategy=strategy,
        repetition=repetition,
    )


def table(result: Report) -> Table:
    """Return the result as a table for people."""
    shown = Table("", "", box=box.SIMPLE, show_header=False)
    rows = {
        "jobs": f"{result.jobs}: {result.succeeded} succeeded, {result.failed} failed",
        "lost": f"{result.lost}",
        "committed twice": f"{result.committed_twice}",
        "executed twice": f"{result.executed_twice} (work that the crash cut short was done again)",
        "killed": f"{result.killed_node}, holding {result.held_by_killed_node} jobs",
        "noticed": f"{_seconds(result.detected_after_s)} after the kill",
        "jobs in new hands": f"{_seconds(result.reowned_after_s)} after the kill (promised: {REOWNED_WITHIN_S:g} s)",
        "throughput": f"{result.throughput_per_s:g} jobs/s",
        "latency": f"p50 {result.latency_p50_s:.2f} s, p99 {result.latency_p99_s:.2f} s, waiting included",
        **({"sent twice": _twice(result.repetition)} if result.repetition else {}),
        "strategy": result.strategy,
        **{f"done by {node}": f"{count}" for node, count in result.jobs_by_node.items()},
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def _repeated(keys: Iterable[K]) -> set[K]:
    return {key for key, count in Counter(keys).items() if count > 1}


def _span_s(accepted: Sequence[Entry], committed: Sequence[Entry]) -> float:
    wanted = {entry.job_id for entry in accepted}
    last_s = max(entry.at_s for entry in committed if entry.job_id in wanted)
    return max(last_s - accepted[0].at_s, 0.001)


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _twice(repetition: Repetition) -> str:
    first, second = repetition.first_per_s, repetition.second_per_s
    return f"{first:g} jobs/s, then from the cache {second:g} ({second / first:.0f} times as many)"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"
