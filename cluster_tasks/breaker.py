"""A circuit breaker as pure functions over a frozen state: who calls passes the time, in seconds of one clock.

Closed, it lets every call through and remembers how the last ones ended; when ``failure_threshold`` of them failed it
opens. Open, it lets nothing through for ``timeout_s``. Half-open, it lets a few *probes* through, no more at once than
successes are missing: a failure opens it again, ``success_threshold`` successes close it. A probe holds a lease: one
that hangs, or whose process died, makes room when that ends.

A call that was let through before the breaker opened or closed says nothing of the time since, and is not counted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from threading import Lock

from cluster_tasks.clock import Clock


class Phase(StrEnum):
    """What a breaker does with the next call."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Outcome(StrEnum):
    """How a call ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    UNKNOWN = "unknown"
    """It was given up, which says nothing of whom it was sent to."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and closes. Raises ValueError for numbers with which it never would."""

    failure_threshold: int = 5
    """So many failures in the window open it."""
    success_threshold: int = 2
    """So many successful probes close it."""
    timeout_s: float = 30.0
    """How long it stays open before the first probe."""
    window: int = 10
    """The window holds so many calls, the last ones. Twice the failure threshold: it opens when half of them failed."""
    window_s: float = 300.0
    """A call that ended longer ago is out of the window."""
    minimum_volume: int = 0
    """With fewer calls in the window it stays closed, however they ended."""
    probe_lease_s: float = 30.0
    """After so long without an outcome another probe takes the place of one."""

    def __post_init__(self) -> None:
        if min(self.failure_threshold, self.success_threshold) < 1:
            raise ValueError("failure_threshold and success_threshold are at least 1")
        if min(self.timeout_s, self.window_s, self.probe_lease_s) <= 0:
            raise ValueError("timeout_s, window_s and probe_lease_s are more than 0")
        if self.window < max(self.failure_threshold, self.minimum_volume):
            raise ValueError("a window smaller than failure_threshold or minimum_volume never opens the breaker")


@dataclass(frozen=True, slots=True)
class BreakerState:
    """All that a breaker remembers."""

    generation: int = 0
    """Raised by each opening and each closing."""
    opened_at_s: float | None = None
    """None: closed."""
    calls: tuple[tuple[float, bool], ...] = ()
    """When each call of the window ended and whether it failed, the oldest first."""
    successes: int = 0
    """Of probes, since it opened."""
    leases: tuple[float, ...] = ()
    """When the lease of each probe ends that has not told its outcome."""

    def to_json(self) -> str:
        """The state as text, for ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> BreakerState:
        """The state that ``to_json``, or a script of Redis, wrote. What is missing there has its default."""
        given = json.loads(text)
        # Lua writes an empty list as {}.
        given["calls"] = tuple((ended_at_s, bool(failed)) for ended_at_s, failed in given.get("calls", ()))
        given["leases"] = tuple(given.get("leases", ()))
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Permit:
    """One call was let through; its outcome is told with this."""

    generation: int
    lease_until_s: float | None = None
    """Of a probe; None: the breaker was closed."""


def phase_of(state: BreakerState, policy: BreakerPolicy, now_s: float) -> Phase:
    """Return the phase at ``now_s``."""
    if state.opened_at_s is None:
        return Phase.CLOSED
    return Phase.OPEN if now_s < state.opened_at_s + policy.timeout_s else Phase.HALF_OPEN


def admit(state: BreakerState, policy: BreakerPolicy, now_s: float) -> tuple[BreakerState, Permit | None]:
    """Let a call through, or not: then the permit is None. Whoever gets a permit ends it by ``record``."""
    phase = phase_of(state, policy, now_s)
    if phase is Phase.CLOSED:
        return state, Permit(state.generation)
    live = _live(state, now_s)
    if phase is Phase.OPEN or len(live) >= _probes(state, policy):
        return state, None
    lease_until_s = now_s + policy.probe_lease_s
    return replace(state, leases=(*live, lease_until_s)), Permit(state.generation, lease_until_s)


def record(state: BreakerState, policy: BreakerPolicy, now_s: float, permit: Permit, outcome: Outcome) -> BreakerState:
    """Take in how a call ended. One that was let through before the last opening or closing changes nothing."""
    if permit.generation != state.generation:
        return state
    if state.opened_at_s is None:
        return _counted(state, policy, now_s, outcome)
    if outcome is Outcome.FAILURE:
        return _opened(state, now_s)
    successes = state.successes + (outcome is Outcome.SUCCESS)
    if successes >= policy.success_threshold:
        return BreakerState(state.generation + 1)
    return replace(state, successes=successes, leases=_without(state.leases, permit.lease_until_s))


def wait_s(state: BreakerState, policy: BreakerPolicy, now_s: float) -> float:
    """Seconds until ``admit`` may let a call through, if no outcome is told before; 0: now."""
    phase = phase_of(state, policy, now_s)
    if phase is Phase.OPEN:
        assert state.opened_at_s is not None
        return state.opened_at_s + policy.timeout_s - now_s
    live = _live(state, now_s)
    if phase is Phase.CLOSED or len(live) < _probes(state, policy):
        return 0.0
    return min(live) - now_s


def news(before: BreakerState, after: BreakerState) -> Phase | None:
    """The phase to tell people about, if a step has opened or closed the breaker; a failed probe is no news."""
    if (before.opened_at_s is None) == (after.opened_at_s is None):
        return None
    return Phase.CLOSED if after.opened_at_s is None else Phase.OPEN


class Breaker:
    """A breaker of this process, on the monotonic clock. Safe to share between threads."""

    def __init__(self, policy: BreakerPolicy, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._state, self._lock = BreakerState(), Lock()

    @property
    def phase(self) -> Phase:
        """What it does with the next call."""
        return phase_of(self._state, self._policy, self._clock.monotonic())

    def admit(self) -> Permit | None:
        """As the function."""
        with self._lock:
            self._state, permit = admit(self._state, self._policy, self._clock.monotonic())
        return permit

    def record(self, permit: Permit, outcome: Outcome) -> Phase | None:
        """As the function; returns the ``news``."""
        with self._lock:
            before = self._state
            self._state = record(before, self._policy, self._clock.monotonic(), permit, outcome)
            return news(before, self._state)

    def wait_s(self) -> float:
        """As the function."""
        return wait_s(self._state, self._policy, self._clock.monotonic())


def _counted(state: BreakerState, policy: BreakerPolicy, now_s: float, outcome: Outcome) -> BreakerState:
    if outcome is Outcome.UNKNOWN:
        return state
    young = [call for call in state.calls if call[0] > now_s - policy.window_s]
    calls = (*young, (now_s, outcome is Outcome.FAILURE))[-policy.window :]
    failures = sum(failed for _, failed in calls)
    full = len(calls) >= policy.minimum_volume and failures >= policy.failure_threshold
    # A success may bring the volume, but is no reason to open.
    if outcome is Outcome.FAILURE and full:
        return _opened(state, now_s)
    return replace(state, calls=calls)


def _opened(state: BreakerState, now_s: float) -> BreakerState:
    return BreakerState(state.generation + 1, opened_at_s=now_s)


def _probes(state: BreakerState, policy: BreakerPolicy) -> int:
    """How many probes may be out at once."""
    # As many have succeeded already where the threshold was lowered meanwhile: one more closes the breaker.
    return max(policy.success_threshold - state.successes, 1)


def _live(state: BreakerState, now_s: float) -> tuple[float, ...]:
    return tuple(until_s for until_s in state.leases if until_s > now_s)


def _without(leases: tuple[float, ...], lease: float | None) -> tuple[float, ...]:
    if lease not in leases:
        return leases
    position = leases.index(lease)
    return leases[:position] + leases[position + 1 :]
