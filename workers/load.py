"""What a node measures of itself."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import psutil

from cluster_tasks.model import Load

QPS_WINDOW_S = 10.0
HISTORY = 200
"""Jobs that the success rate looks back on."""


class Outcomes:
    """How this process' last jobs ended. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._ended_s: deque[float] = deque()
        self._successes: deque[bool] = deque(maxlen=HISTORY)

    def record(self, success: bool) -> None:
        """Count a job that ended now."""
        with self._lock:
            self._ended_s.append(self._now())
            self._successes.append(success)

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


outcomes = Outcomes()
"""Of this process: Celery builds its requests itself, so they have to find it by name."""


def measure(held: int) -> Load:
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
    )
