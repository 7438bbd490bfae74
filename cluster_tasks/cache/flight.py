"""One computation of a missing key at a time: threads of a process share it, and processes wait for each other.

While Redis is away each process computes for itself.

What will soon be stale is computed anew by chance, the sooner the more it costs: probabilistic early expiration, as in
Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015, formula XFetch.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING

from cluster_tasks.cache.counters import Counters
from cluster_tasks.cache.entry import Entry
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.cache.leases import LEASE_S, ComputeMany, Leases, Values, compute_under, computed, give_back, lasting
from cluster_tasks.errors import CacheUnavailable

if TYPE_CHECKING:
    from cluster_tasks.cache.base import Cache

logger = logging.getLogger(__name__)

POLL_S = (0.01, 0.2)
"""Who waits for another process looks after these times, and after longer ones the longer it takes."""
REFRESHERS = 4
"""Threads of a process that compute ahead of time."""
Compute = Callable[[], bytes | None]


class Refresh(Enum):
    """When a value that is there is computed anew."""

    IN_TIME = "in time"
    """In the background, when it is stale and kept, or by chance shortly before."""
    NEVER = "never"
    """When it is not fresh any more, by whoever asks then."""
    NOW = "now"
    """Always, and every process forgets the old one."""


class Flights:
    """The computations of a process for one namespace. Safe to share between threads, and in forked children."""

    def __init__(self, cache: Cache, counters: Counters) -> None:
        self._cache, self._counters = cache, counters
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[bytes | None]] = {}
        self._ahead: set[str] = set()
        self._refreshers: ThreadPoolExecutor | None = None

    def get(
        self, key: str, compute: Compute, ttl_s: float, refresh: Refresh, kept_s: float, negative_ttl_s: float | None
    ) -> bytes | None:
        """As ``Cache.get_or_compute``, with all that is left open there."""
        flight = _Flight(self._cache, self._counters, key, compute, ttl_s, kept_s, negative_ttl_s, refresh)
        if refresh is Refresh.NOW:
            return flight.compute_and_write()
        entry = flight.look()
        if entry is not None and (entry.is_fresh or refresh is Refresh.IN_TIME):
            if refresh is Refresh.IN_TIME and is_due(entry):
                self._compute_ahead(key, flight)
            return entry.value
        return self._join(key, flight)

    def _join(self, key: str, flight: _Flight) -> bytes | None:
        with self._lock:
            running = self._running.get(key)
            if running is None:
                mine = self._running[key] = Future[bytes | None]()
        if running is not None:
            return running.result()
        try:
            value = flight.compute_alone()
        except BaseException as exc:
            self._land(key, mine).set_exception(exc)
            raise
        self._land(key, mine).set_result(value)
        return value

    def _compute_ahead(self, key: str, flight: _Flight) -> None:
        with self._lock:
            if key in self._ahead or key in self._running:
                return
            self._ahead.add(key)
            if self._refreshers is None:
                self._refreshers = ThreadPoolExecutor(REFRESHERS, "cache-refresh")
            refreshers = self._refreshers
        try:
            refreshers.submit(self._refresh, key, flight)
        except RuntimeError:  # The interpreter is about to end.
            self._ahead.discard(key)

    def _refresh(self, key: str, flight: _Flight) -> None:
        try:
            flight.compute_if_nobody_does()
        except Exception as exc:  # noqa: BLE001 - there is a value, and whoever misses it will see the error
            logger.warning("a value that is stale, or will be, could not be computed anew: %r", exc)
        finally:
            self._ahead.discard(key)

    def _land(self, key: str, mine: Future[bytes | None]) -> Future[bytes | None]:
        with self._lock:
            if self._running.get(key) is mine:
                del self._running[key]
        return mine


class _Flight:
    """One caller's wish for a value."""

    def __init__(
        self, cache: Cache, counters: Counters, key: str, compute: Compute, ttl_s: float, kept_s: float,
        negative_ttl_s: float | None, refresh: Refresh,
    ) -> None:  # fmt: skip
        self._cache, self._counters, self._key, self._compute = cache, counters, key, compute
        self._ttl_s, self._kept_s, self._negative_ttl_s, self._refresh = ttl_s, kept_s, negative_ttl_s, refresh
        self._generation: str | None = None

    def look(self) -> Entry | None:
        """Return what is there."""
        reading = self._cache.read([self._key])
        self._generation = reading.generation
        entry = reading.entries.get(self._key)
        if entry is not None:
            self._counters.add(values_stale=not entry.is_fresh)
        return entry

    def compute_alone(self) -> bytes | None:
        """Compute, unless another process does: then wait for that."""
        for pause_s in _pauses():
            try:
                lease = self._cache.lease([self._key], LEASE_S)
            except CacheUnavailable:
                return self._computed()[0]
            if lease:
                # It may have been stored since it was missed, just before the lease was given back.
                if (entry := self._fresh()) is not None:
                    give_back(self._cache, lease)
                    return entry.value
                return self._compute_under(lease)
            time.sleep(pause_s)
            if (entry := self._fresh()) is not None:
                return entry.value
        raise AssertionError("pauses do not end")

    def compute_if_nobody_does(self) -> None:
        """Compute, unless another process does, or the cache is away."""
        try:
            lease = self._cache.lease([self._key], LEASE_S)
        except CacheUnavailable:
            return
        if lease:
            self._compute_under(lease)

    def compute_and_write(self) -> bytes | None:
        """Compute in any case, and let it take the place of what is there."""
        self._generation = self._cache.read([self._key]).generation
        value, cost_s = self._computed()
        if (entry := self._entry(value, cost_s)) is not None:
            self._cache.write(
                {self._key: value}, entry.ttl_s, kept_s=self._kept_s, cost_s=cost_s, generation=self._generation
            )
        return value

    def _fresh(self) -> Entry | None:
        entry = self.look()
        return entry if entry is not None and entry.is_fresh else None

    def _compute_under(self, lease: Leases) -> bytes | None:
        values, _ = compute_under(self._cache, lease, self._compute_key, self._entry)
        return values[self._key]

    def _computed(self) -> tuple[bytes | None, float]:
        values, cost_s = computed(self._cache, self._compute_key, [self._key])
        return values[self._key], cost_s

    def _compute_key(self, _: list[str]) -> Values:
        return {self._key: self._compute()}

    def _entry(self, value: bytes | None, cost_s: float) -> Entry | None:
        """What is stored of a value; None: nothing."""
        ttl_s = self._negative_ttl_s if value is None else self._ttl_s
        return None if ttl_s is None else Entry(value, ttl_s, ttl_s, self._kept_s, cost_s, self._generation or "")


def is_due(entry: Entry) -> bool:
    """Whether to compute an entry anew: it is stale, or by chance a little before (XFetch, with beta = 1)."""
    # 1 - random() is never 0.
    return entry.left_s <= -entry.cost_s * math.log(1.0 - random.random())


def compute_missing(cache: Cache, keys: list[str], compute: ComputeMany, ttl_s: float) -> dict[str, bytes]:
    """As ``Cache.get_or_compute_many``, with all that is left open there."""
    found, generation = _fresh(cache, keys)
    missing = [key for key in dict.fromkeys(keys) if key not in found]
    pauses = _pauses()
    while missing:
        try:
            leases = cache.lease(missing, LEASE_S)
        except CacheUnavailable:
            found.update(_there(computed(cache, compute, missing)[0]))
            break
        if leases:
            # They may have been stored since they were missed, just before the leases were given back.
            known, generation = _fresh(cache, list(leases))
            found.update(known)
            if known:
                give_back(cache, {key: leases.pop(key) for key in known})
        if leases:
            made, _ = compute_under(cache, leases, compute, lasting(ttl_s, generation))
            found.update(_there(made))
        missing = [key for key in missing if key not in leases and key not in found]
        if missing:
            time.sleep(next(pauses))
            found.update(_fresh(cache, missing)[0])
            missing = [key for key in missing if key not in found]
    return found


def _fresh(cache: Cache, keys: list[str]) -> tuple[dict[str, bytes], str | None]:
    reading = cache.read(keys)
    return _there({key: entry.value for key, entry in reading.entries.items() if entry.is_fresh}), reading.generation


def _there(values: Values) -> dict[str, bytes]:
    return {key: value for key, value in values.items() if value is not None}


def _pauses() -> Iterator[float]:
    pause_s, most_s = POLL_S
    while True:
        yield random.uniform(pause_s / 2, pause_s)
        pause_s = min(2 * pause_s, most_s)
