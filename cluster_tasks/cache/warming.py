"""Filling a cache before somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import track

if TYPE_CHECKING:
    from cluster_tasks.cache.base import Cache

BATCH = 200
Loader = Callable[[list[str]], Mapping[str, bytes]]
"""Returns the values of some keys, by key; those that have none are left out."""


@dataclass(frozen=True, slots=True)
class Warmed:
    """How many keys were there already, were stored, and had no value or could not be stored."""

    present: int = 0
    stored: int = 0
    left_out: int = 0


def warm(cache: Cache, loader: Loader, keys: Iterable[str], ttl_s: float | None, batch: int, progress: bool) -> Warmed:
    """As ``Cache.warm``."""
    wanted = list(dict.fromkeys(keys))
    present = stored = 0
    for start in track(range(0, len(wanted), batch), "Warming the cache", disable=not progress):
        some = wanted[start : start + batch]
        reading = cache.read(some)
        missing = [key for key in some if key not in reading.entries or not reading.entries[key].is_fresh]
        present += len(some) - len(missing)
        if missing:
            values = {key: value for key, value in loader(missing).items() if key in missing}
            if cache.write(values, ttl_s, generation=reading.generation, replaces=False):
                stored += len(values)
    return Warmed(present, stored, len(wanted) - present - stored)
