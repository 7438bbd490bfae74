"""Time as a dependency: policies are given a clock and never read one themselves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What a policy needs of time. Every value is in seconds."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start, never going back; for durations."""

    def time(self) -> float:
        """Seconds since 1970; for stamps that people read, never for decisions."""


class SystemClock:
    """The clocks of this machine."""

    def monotonic(self) -> float:
        """Seconds on a clock that no setting of the time moves, and that goes on while the machine sleeps."""
        # CLOCK_BOOTTIME goes on while the machine sleeps: a lease must run out then, too.
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time(self) -> float:
        """Seconds since 1970, as this machine has them."""
        return time.time()


class ManualClock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def monotonic(self) -> float:
        """The seconds that it was started with and told to let pass."""
        return self._now_s

    def time(self) -> float:
        """The same: both of its clocks are one."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass. Raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock does not go back: seconds={seconds}")
        self._now_s += seconds
