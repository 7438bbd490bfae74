"""When this machine itself stood still: what was measured then tells nothing of the cluster."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

TICK_S = 0.05
STALL_S = 0.25
"""So late a thread wakes that has nothing to do: then nodes and observers are as late, each for itself."""


class Stalls:
    """Watches on a thread of its own, as a context."""

    def __init__(self) -> None:
        self._stalls: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def during(self, began: float, ended: float) -> bool:
        """Whether it stood still at any time between, in seconds since 1970."""
        return any(first < ended and last > began for first, last in self._stalls)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            slept_at = time.time()
            time.sleep(TICK_S)
            woken_at = time.time()
            if woken_at - slept_at > TICK_S + STALL_S:
                self._stalls.append((slept_at, woken_at))
