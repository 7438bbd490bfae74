"""The locks seam: what must be done by one at a time, with a fencing token for whatever it writes to.

A lock alone does not keep a second writer away: a process that is stopped for longer than its lock lasts goes on as if
it held it. So each acquisition has a *token*, greater than all before it of that name, and the resource keeps the
highest token it has seen and refuses lower ones: ``docs/locks.md``.
"""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote, unquote

from cluster_tasks.clock import Clock
from cluster_tasks.errors import LockLost, LockTaken, UnavailableError

logger = logging.getLogger(__name__)

LONGEST_TTL_S = 86_400.0
LONGEST_NAME = 400
"""Bytes of a name as it stands in a key, where what is not a letter, digit or one of ``_.-~`` takes three."""
POLL_S = (0.05, 0.25)
"""Who waits asks again after a time between these."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A lock that was given."""

    key: str
    token: int
    ttl_s: float
    lease: str = ""
    """What the store needs besides to find it again."""


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that somebody holds, whoever that is."""

    name: str
    left_s: float | None
    """How long it lasts unless it is renewed, inf: it has no end; None: the store does not tell."""


class LockStore(Protocol):
    """Where locks live. Every method raises LocksUnavailable when the service does not answer.

    A store may be used from several threads and, after a fork, from both processes. A lock that nobody renews ends
    after its TTL by the service's own clock: never before, and as soon after as the service can.
    """

    def take(self, key: str, ttl_s: float) -> Grant | None:
        """Take the lock if nobody has it. If the reply is lost, it is held by nobody until its TTL is over."""

    def renew(self, grant: Grant) -> bool:
        """Let the lock last its TTL from now on. False: it is not that grant's any more, and was not touched."""

    def release(self, grant: Grant) -> bool:
        """Give the lock back. False: it is not that grant's any more, and was not touched."""

    def held(self) -> dict[str, float | None]:
        """Return for each key that is held how long it lasts, as ``HeldLock.left_s`` has it."""

    def close(self) -> None:
        """Release connections. Safe to repeat, also before first use."""


class Held:
    """A lock that this process holds, until it is released or its time runs out.

    As a context manager it releases the lock at the end. That raises LockLost if the lock had gone to nobody or
    another before, unless the block itself raised; a service that does not answer then is logged, since the lock runs
    out by itself.
    """

    def __init__(self, store: LockStore, grant: Grant, name: str, sent_at_s: float, clock: Clock) -> None:
        self._store, self._grant, self._clock = store, grant, clock
        self._until_s, self._released = sent_at_s + grant.ttl_s, False
        self.name = name

    @property
    def token(self) -> int:
        """Greater than the token of every earlier acquisition of this name; below 2**63."""
        return self._grant.token

    @property
    def left_s(self) -> float:
        """So long it lasts at least, by this machine's clock, which goes on while the process is stopped."""
        return 0.0 if self._released else max(0.0, self._until_s - self._clock.monotonic())

    def renew(self) -> None:
        """Let it last its TTL from now on. Raises LockLost and LocksUnavailable."""
        # Stamped before it is sent: a slow reply must shorten the lock, never stretch it.
        sent_at_s = self._clock.monotonic()
        if self._released or not self._store.renew(self._grant):
            self._until_s = sent_at_s
            raise LockLost(self.name, self.token)
        self._until_s = sent_at_s + self._grant.ttl_s

    def release(self) -> None:
        """Let others have it; safe to repeat. Raises LocksUnavailable, and LockLost if it was not held to the end."""
        if self._released:
            return
        released = self._store.release(self._grant)
        self._released = True
        if not released:
            raise LockLost(self.name, self.token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except UnavailableError as exc:
            logger.warning("lock not released, it runs out", extra={"lock": self.name, "reason": str(exc)})
        except LockLost:
            if error is None:
                raise


class Locks:
    """Locks by name, for all processes that use the same store and cluster name."""

    def __init__(self, store: LockStore, clock: Clock) -> None:
        self._store, self._clock = store, clock

    def acquire(self, name: str, ttl_s: float, wait_s: float = 0.0) -> Held:
        """Take the lock ``name`` for at least ``ttl_s``; while another has it, ask again for ``wait_s``.

        Who waits is served in no order. Raises LockTaken when the time is over, LocksUnavailable at once when the
        service does not answer, and ValueError for arguments that cannot work.
        """
        key = check_name(name)
        if not 0.001 <= ttl_s <= LONGEST_TTL_S:
            raise ValueError(f"ttl_s={ttl_s!r}: expected seconds between 0.001 and {LONGEST_TTL_S:g}")
        if not (wait_s >= 0 and math.isfinite(wait_s)):
            raise ValueError(f"wait_s={wait_s!r}: expected seconds, 0 or more; 0 asks once")
        until_s = self._clock.monotonic() + wait_s
        while True:
            sent_at_s = self._clock.monotonic()
            if grant := self._store.take(key, ttl_s):
                return Held(self._store, grant, name, sent_at_s, self._clock)
            left_s = until_s - self._clock.monotonic()
            if left_s <= 0:
                raise LockTaken(name, wait_s)
            time.sleep(min(random.uniform(*POLL_S), left_s))

    def held(self) -> list[HeldLock]:
        """Return the locks that are held by anybody, by name. Takes the longer, the more keys the store has.

        Raises LocksUnavailable.
        """
        return [HeldLock(unquote(key), left_s) for key, left_s in sorted(self._store.held().items())]

    def close(self) -> None:
        """Release connections; locks that are held stay. Safe to repeat, also before first use."""
        self._store.close()


def check_name(name: str) -> str:
    """Return ``name`` as it stands in a key. Raises ValueError for one that is empty, too long or no text."""
    try:
        key = quote(name, safe="")
    except UnicodeEncodeError:
        key = ""
    if not 0 < len(key) <= LONGEST_NAME:
        raise ValueError(
            f"name={name[:100]!r} of a lock: expected text of 1 to {LONGEST_NAME} letters, digits and _.-~; "
            "each byte of any other character counts as three"
        )
    return key
