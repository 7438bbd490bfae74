"""Computing under a *lease*, which one process holds for each key, and lets last for as long as it lives.

Who dies delays the others by what is left of it. What is computed is stored only if the lease stands to the end: a key
that was written, deleted or made void meanwhile has lost it. Where nothing is stored in the end, because there is
nothing, it may not be kept, or it failed, the lease is *shared* for a moment: all who wait compute at once, as they
would without a cache, and not one after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster_tasks.cache.entry import Entry, as_bytes
from cluster_tasks.errors import CacheUnavailable

if TYPE_CHECKING:
    from cluster_tasks.cache.base import Cache

logger = logging.getLogger(__name__)

LEASE_S = 3.0
"""How long a process that died delays the others at most."""
RENEWED_S = LEASE_S / 3
SHARED = "shared:"
"""How the token of a shared lease begins; the token that it had before follows."""
SHARED_S = 1.0
"""Long enough for all who wait to see it."""
Leases = Mapping[str, str]
"""Key → token."""
Values = Mapping[str, bytes | None]
ComputeMany = Callable[[list[str]], Values]
EntryOf = Callable[[bytes | None, float], Entry | None]
"""Makes of a value, and the seconds that it took, what is stored; None: nothing."""


def compute_under(
    cache: Cache, leases: Leases, compute: ComputeMany, entry_of: EntryOf, *, replaces: bool = False
) -> tuple[Values, int]:
    """Compute what is leased, store it and give the leases back; return the values, and how many were stored.

    ``replaces``: every process is told to forget what was there. Raises what ``compute`` raises. While the cache is
    away nothing is stored.
    """
    try:
        with _holding(cache, leases):
            values, cost_s = computed(cache, compute, list(leases))
    except BaseException:
        give_back(cache, leases, shared=True)
        raise
    entries = {key: entry for key in values if (entry := entry_of(values[key], cost_s)) is not None}
    stored = 0
    if entries:
        try:
            stored = cache.commit(leases, entries, replaces=replaces)
        except CacheUnavailable as exc:
            logger.debug("values were computed and cannot be stored: %s", exc)
    if rest := {key: token for key, token in leases.items() if key not in entries}:
        give_back(cache, rest, shared=True)
    return values, stored


def computed(cache: Cache, compute: ComputeMany, keys: list[str]) -> tuple[Values, float]:
    """Return what ``compute`` makes of keys, and the seconds that each took, and count both."""
    began_s = time.perf_counter()
    made = compute(keys)
    cost_s = time.perf_counter() - began_s
    values = {key: as_bytes(key, made[key]) for key in keys if key in made}
    cache.counters.add(values_computed=len(values), values_computed_s=cost_s)
    return values, cost_s / max(1, len(values))


def lasting(ttl_s: float, generation: str | None, kept_s: float = 0.0, negative_ttl_s: float | None = None) -> EntryOf:
    """Store values for ``ttl_s`` as of a generation, and that there is nothing for ``negative_ttl_s``, if given."""

    def entry_of(value: bytes | None, cost_s: float) -> Entry | None:
        lasts_s = negative_ttl_s if value is None else ttl_s
        # What a value was computed from may be void if the generation is not known.
        if lasts_s is None or generation is None:
            return None
        return Entry(value, lasts_s, lasts_s, kept_s, cost_s, generation)

    return entry_of


def give_back(cache: Cache, leases: Leases, *, shared: bool = False) -> None:
    """Let one other compute what is leased, with ``shared`` all; while the cache is away, when the leases run out."""
    try:
        cache.hold(leases, SHARED_S if shared else 0, shared=shared)
    except CacheUnavailable as exc:
        logger.debug("leases run out by themselves: %s", exc)


def shared_token(token: str) -> str:
    """Return the token that a lease has when it is shared: no other that is shared later has the same."""
    return token if token.startswith(SHARED) else SHARED + token


@contextmanager
def _holding(cache: Cache, leases: Leases) -> Iterator[None]:
    """Let leases last until the block ends, however long that takes."""
    done = threading.Event()
    mine = {key: token for key, token in leases.items() if not token.startswith(SHARED)}

    def hold() -> None:
        while not done.is_set():
            try:
                if not cache.hold(mine, LEASE_S):
                    return
            except CacheUnavailable as exc:
                logger.debug("leases are not renewed for now: %s", exc)
            done.wait(RENEWED_S)

    # Most computations are over before it is needed.
    timer = threading.Timer(RENEWED_S, hold)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        done.set()
