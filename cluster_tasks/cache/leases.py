"""Computing under a *lease*, which one process holds for each key, and lets last for as long as it lives.

Who dies delays the others by what is left of it. What is computed is stored only if the lease stands to the end: a key
that was written, deleted or made void meanwhile has lost it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster_tasks.cache.entry import Entry
from cluster_tasks.errors import CacheUnavailable

if TYPE_CHECKING:
    from cluster_tasks.cache.base import Cache

logger = logging.getLogger(__name__)

LEASE_S = 3.0
"""How long a process that died delays the others at most."""
Leases = Mapping[str, str]
"""Key → token."""
Values = Mapping[str, bytes | None]
ComputeMany = Callable[[list[str]], Values]
EntryOf = Callable[[bytes | None, float], Entry | None]
"""Makes of a value, and the seconds that it took, what is stored; None: nothing."""


def compute_under(cache: Cache, leases: Leases, compute: ComputeMany, entry_of: EntryOf) -> tuple[Values, int]:
    """Compute what is leased, store it and give the leases back; return the values, and how many were stored.

    Raises what ``compute`` raises. While the cache is away nothing is stored.
    """
    try:
        with _holding(cache, leases):
            values, cost_s = computed(cache, compute, list(leases))
    except BaseException:
        give_back(cache, leases)
        raise
    entries = {key: entry for key in leases if key in values and (entry := entry_of(values[key], cost_s)) is not None}
    stored = 0
    if entries:
        try:
            stored = cache.commit(leases, entries)
        except CacheUnavailable as exc:
            logger.debug("values were computed and cannot be stored: %s", exc)
    if rest := {key: token for key, token in leases.items() if key not in entries}:
        give_back(cache, rest)
    return values, stored


def computed(cache: Cache, compute: ComputeMany, keys: list[str]) -> tuple[Values, float]:
    """Return what ``compute`` makes of keys, and the seconds that each took, and count both."""
    began_s = time.perf_counter()
    made = compute(keys)
    values = {key: made[key] for key in keys if key in made}
    cost_s = time.perf_counter() - began_s
    cache.counters.add(values_computed=len(values), values_computed_s=cost_s)
    return values, cost_s / max(1, len(values))


def lasting(ttl_s: float, generation: str | None) -> EntryOf:
    """Store all values for ``ttl_s``, as of a generation, and nothing of what there is not."""
    return lambda value, cost_s: None if value is None else Entry(value, ttl_s, ttl_s, 0.0, cost_s, generation or "")


def give_back(cache: Cache, leases: Leases) -> None:
    """Let others compute what is leased; while the cache is away, when the leases run out."""
    try:
        cache.hold(leases, 0)
    except CacheUnavailable as exc:
        logger.debug("leases run out by themselves: %s", exc)


@contextmanager
def _holding(cache: Cache, leases: Leases) -> Iterator[None]:
    """Let leases last until the block ends, however long that takes."""
    done = threading.Event()

    def hold() -> None:
        while not done.wait(LEASE_S / 3):
            try:
                if not cache.hold(leases, LEASE_S):
                    return
            except CacheUnavailable as exc:
                logger.debug("leases are not renewed for now: %s", exc)

    # Most computations are over before it is needed.
    timer = threading.Timer(LEASE_S / 3, hold)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        done.set()
