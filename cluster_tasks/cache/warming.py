"""Filling a cache before somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster_tasks.cache.leases import LEASE_S, EntryOf, compute_under, lasting
from cluster_tasks.errors import CacheUnavailable

if TYPE_CHECKING:
    from cluster_tasks.cache.base import Cache

BATCH = 200
Loader = Callable[[list[str]], Mapping[str, bytes]]
"""Returns the values of some keys, by key; those that have none are left out."""


@dataclass(frozen=True, slots=True)
class Warmed:
    """How many keys were there already, were stored, and had no value, could not be stored or are loaded by another."""

    present: int = 0
    stored: int = 0
    left_out: int = 0


def warm(cache: Cache, loader: Loader, keys: Iterable[str], ttl_s: float, batch: int, progress: bool) -> Warmed:
    """As ``Cache.warm``."""
    # Here, because every node and command imports this module, and few ever show a bar.
    from rich.progress import track

    wanted = list(dict.fromkeys(keys))
    present = stored = 0
    for start in track(range(0, len(wanted), batch), "Warming the cache", disable=not progress):
        some = wanted[start : start + batch]
        reading = cache.read(some)
        missing = [key for key in some if key not in reading.entries or not reading.entries[key].is_fresh]
        present += len(some) - len(missing)
        stored += _load(cache, loader, missing, lasting(ttl_s, reading.generation)) if missing else 0
    return Warmed(present, stored, len(wanted) - present - stored)


def _load(cache: Cache, loader: Loader, keys: list[str], entry_of: EntryOf) -> int:
    # Under leases: what is changed or deleted while it is loaded must not come back with it.
    try:
        leases = cache.lease(keys, LEASE_S)
    except CacheUnavailable:
        return 0
    return compute_under(cache, leases, loader, entry_of)[1] if leases else 0
