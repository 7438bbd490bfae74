"""What a node measures of itself."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from statistics import median

import psutil

from cluster_tasks.failover.outliers import SURE
from cluster_tasks.model import Load, Recent

QPS_WINDOW_S = 10.0
HISTORY = 200
"""Jobs that the success rate looks back on."""
RECENT = 100
"""Jobs that are compared with those of other nodes."""
RECENT_S = 300.0
ALARMING = 10
"""So many failures in a row are told at once."""


@dataclass(frozen=True, slots=True)
class _Run:
    ended_s: float
    task: str
    success: bool
    seconds: float


class Outcomes:
    """How this process' last jobs ended. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._ended_s: deque[float] = deque()
        self._successes: deque[bool] = deque(maxlen=HISTORY)
        self._runs: deque[_Run] = deque(maxlen=RECENT)
        self._trial = ""
        self._failed_in_a_row = 0
        self.alarm: Callable[[], None] = lambda: None
        """Called after so many failures in a row that others should know of it soon."""

    def record(self, success: bool) -> None:
        """Count a job that ended now."""
        with self._lock:
            self._ended_s.append(self._now())
            self._successes.append(success)

    def record_run(self, task: str, success: bool, seconds: float, trial: str) -> None:
        """Count a job that ran and ended now, of a trial or ("") of none, to be compared with those of other nodes."""
        with self._lock:
            self._begin(trial)
            self._runs.append(_Run(self._now(), task, success, seconds))
            self._failed_in_a_row = 0 if success else self._failed_in_a_row + 1
            alarming = self._failed_in_a_row and self._failed_in_a_row % ALARMING == 0
        if alarming:
            self.alarm()

    def recent(self, trial: str) -> dict[str, Recent]:
        """How the last jobs of a trial ended, by the name of their task."""
        with self._lock:
            self._begin(trial)
            oldest_s = self._now() - RECENT_S
            runs = [run for run in self._runs if run.ended_s >= oldest_s]
        by_task: dict[str, list[_Run]] = {}
        for run in runs:
            by_task.setdefault(run.task, []).append(run)
        return {task: _summary(its) for task, its in by_task.items()}

    def qps(self) -> float:
        """Jobs that ended per second, over the last ten seconds."""
        with self._lock:
            oldest = self._now() - QPS_WINDOW_S
            while self._ended_s and self._ended_s[0] < oldest:
                self._ended_s.popleft()
            return len(self._ended_s) / QPS_WINDOW_S

    def success_rate(self) -> float:
        """Share of the last jobs that did not fail; 1 without history."""
        with self._lock:
            return sum(self._successes) / len(self._successes) if self._successes else 1.0

    def _begin(self, trial: str) -> None:
        if trial != self._trial:
            self._trial = trial
            self._runs.clear()


def _summary(runs: list[_Run]) -> Recent:
    seconds = sorted(run.seconds for run in runs if run.success)
    # The lower bound of the sign test: of n runs, this many below the true median would be no chance.
    below = int(len(seconds) / 2 - SURE * sqrt(len(seconds)) / 2)
    return Recent(
        jobs=len(runs),
        failures=len(runs) - len(seconds),
        latency_s=round(median(seconds), 6) if seconds else 0.0,
        sure_latency_s=round(seconds[below], 6) if len(seconds) > SURE**2 else 0.0,
    )


outcomes = Outcomes()
"""Of this process: Celery builds its requests itself, so they have to find it by name."""


def measure(held: int, trial: str = "") -> Load:
    """Return the load of this process and its children now, with ``held`` jobs."""
    process = psutil.Process()
    memory, threads = 0, 0
    for member in (process, *process.children(recursive=True)):
        try:
            memory += member.memory_info().rss
            threads += member.num_threads()
        except psutil.NoSuchProcess:
            # A pool child that ended while we were counting.
            continue
    return Load(
        current_connections=held,
        current_qps=outcomes.qps(),
        memory_usage_mb=memory / 2**20,
        cpu_usage_percent=psutil.cpu_percent(interval=None),
        thread_count=threads,
        success_rate=outcomes.success_rate(),
        recent=outcomes.recent(trial),
        trial=trial,
    )
