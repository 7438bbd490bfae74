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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

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
Place = tuple[str, str]
"""A key, and among whom what is computed for it is shared before it is stored."""


class Refresh(Enum):
    """When a value that is there is computed anew."""

    IN_TIME = "in time"
    """In the background, when it is stale and kept, or by chance shortly before."""
    NEVER = "never"
    """When it is not fresh any more, by whoever asks then."""
    NOW = "now"
    """Always, and every process forgets the old one."""


class _Abandoned(Exception):
    """Who computed was told to end: who waits computes for himself."""


class Flights:
    """The computations of a process for one namespace. Safe to share between threads, and in forked children."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin with no computation under way: those of the parent's threads are not here."""
        self._lock = threading.Lock()
        self._running: dict[Place, _Running] = {}
        self._computing: set[tuple[str, int]] = set()
        """Keys, each with the thread that computes it."""
        self._ahead: set[str] = set()

    def get(
        self, key: str, compute: Compute, ttl_s: float, refresh: Refresh, kept_s: float, negative_ttl_s: float | None,
        among: str,
    ) -> bytes | None:  # fmt: skip
        """As ``Cache.get_or_compute``, with all that is left open there."""
        flight = _Flight(self._cache, key, compute, ttl_s, kept_s, negative_ttl_s)
        if refresh is Refresh.NOW:
            return flight.compute_anew()
        entry = flight.look()
        if entry is not None and (entry.is_fresh or (refresh is Refresh.IN_TIME and entry.left_s > -kept_s)):
            if refresh is Refresh.IN_TIME and is_due(entry):
                self._compute_ahead((key, among), flight)
            return entry.value
        return self._join((key, among), flight)

    def forget(self, keys: Iterable[str] | None) -> None:
        """Have nobody join what is being computed for keys, or for any: they have changed since it began."""
        changed = None if keys is None else set(keys)
        with self._lock:
            for (key, _), running in self._running.items():
                running.is_void |= changed is None or key in changed

    def _join(self, place: Place, flight: _Flight) -> bytes | None:
        key, me = place[0], (place[0], threading.get_ident())
        while True:
            with self._lock:
                if me in self._computing:
                    raise RuntimeError(
                        f"what computes {key!r} in a cache asks the cache for it, and would wait for itself"
                    )
                running = self._running.get(place)
                if running is None or running.is_void:
                    mine = self._running[place] = _Running(flight)
                    self._computing.add(me)
                    break
            try:
                return running.landed.result()
            except _Abandoned:
                continue
        return self._compute(place, mine, running)

    def _compute(self, place: Place, mine: _Running, void: _Running | None) -> bytes | None:
        try:
            if void is not None:
                mine.flight.relieve(void.flight)
            value = mine.flight.compute_alone()
        except BaseException as exc:
            self._land(place, mine).set_exception(exc if isinstance(exc, Exception) else _Abandoned())
            raise
        self._land(place, mine).set_result(value)
        return value

    def _compute_ahead(self, place: Place, flight: _Flight) -> None:
        key, _ = place
        with self._lock:
            if key in self._ahead or place in self._running or len(self._ahead) >= REFRESHERS:
                return
            self._ahead.add(key)
        # A process that ends does not wait for it.
        threading.Thread(target=self._refresh, args=(key, flight), name="cache-refresh", daemon=True).start()

    def _refresh(self, key: str, flight: _Flight) -> None:
        try:
            flight.compute_if_nobody_does()
        except Exception as exc:  # noqa: BLE001 - there is a value, and whoever misses it will see the error
            logger.warning("a value that is stale, or will be, could not be computed anew: %r", exc)
        finally:
            self._ahead.discard(key)

    def _land(self, place: Place, mine: _Running) -> Future[bytes | None]:
        with self._lock:
            self._computing.discard((place[0], threading.get_ident()))
            if self._running.get(place) is mine:
                del self._running[place]
        return mine.landed


class _Flight:
    """One caller's wish for a value."""

    def __init__(
        self, cache: Cache, key: str, compute: Compute, ttl_s: float, kept_s: float, negative_ttl_s: float | None
    ) -> None:
        self._cache, self._key, self._compute = cache, key, compute
        self._ttl_s, self._kept_s, self._negative_ttl_s = ttl_s, kept_s, negative_ttl_s
        self._generation: str | None = None
        self._leases: Leases = {}

    def look(self) -> Entry | None:
        """Return what is there."""
        reading = self._cache.read([self._key])
        self._generation = reading.generation
        entry = reading.entries.get(self._key)
        if entry is not None:
            self._cache.counters.add(values_stale=not entry.is_fresh)
        return entry

    def compute_alone(self) -> bytes | None:
        """Compute, unless another process does: then wait for that."""
        for pause_s in _pauses():
            try:
                self._leases = lease = self._cache.lease([self._key], LEASE_S)
            except CacheUnavailable:
                return computed(self._cache, self._compute_key, [self._key])[0][self._key]
            # It may have been stored since it was missed, just before the lease was given back.
            if (entry := self.look()) is not None and entry.is_fresh:
                give_back(self._cache, lease)
                return entry.value
            if lease:
                return self._compute_under(lease)
            time.sleep(pause_s)
        raise AssertionError("pauses do not end")

    def relieve(self, void: _Flight) -> None:
        """Have nobody wait for a computation of an earlier generation: its value will not be found."""
        if None not in (void._generation, self._generation) and void._generation != self._generation:
            give_back(self._cache, void._leases)

    def compute_if_nobody_does(self) -> None:
        """Compute what is due, unless another process does, or the cache is away."""
        try:
            lease = self._cache.lease([self._key], LEASE_S)
        except CacheUnavailable:
            return
        if not lease:
            return
        # Another may have just done it.
        if (entry := self.look()) is not None and not is_due(entry):
            give_back(self._cache, lease)
            return
        self._compute_under(lease)

    def compute_anew(self) -> bytes | None:
        """Compute in any case, and let it take the place of what is there."""
        self.look()
        try:
            lease = self._cache.lease([self._key], LEASE_S, by_force=True)
        except CacheUnavailable:
            return computed(self._cache, self._compute_key, [self._key])[0][self._key]
        return self._compute_under(lease, replaces=True)

    def _compute_under(self, lease: Leases, *, replaces: bool = False) -> bytes | None:
        entry_of = lasting(self._ttl_s, self._generation, self._kept_s, self._negative_ttl_s)
        values, _ = compute_under(self._cache, lease, self._compute_key, entry_of, replaces=replaces)
        return values[self._key]

    def _compute_key(self, _: list[str]) -> Values:
        return {self._key: self._compute()}


@dataclass(slots=True)
class _Running:
    """A computation that others may join."""

    flight: _Flight
    landed: Future[bytes | None] = field(default_factory=Future)
    is_void: bool = False
    """Its key has changed since it began: who asks after that is to be given another value."""


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
