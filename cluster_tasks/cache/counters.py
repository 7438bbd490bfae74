"""What caches count: kept in the process, and added to the sums of the cluster when Redis is asked anyway."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

from cluster_tasks.cache.entry import Entry
from cluster_tasks.cache.forks import renewed_after_fork


class Counters:
    """Numbers by name, such as ``local.hits``. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._unsent: dict[str, float] = {}
        renewed_after_fork(self)

    def add(self, **counted: float) -> None:
        """Add to the numbers; ``local_hits`` counts as ``local.hits``."""
        self.update({name.replace("_", ".", 1): number for name, number in counted.items()})

    def update(self, counted: Mapping[str, float]) -> None:
        """Add to the numbers."""
        with self._lock:
            for name, number in counted.items():
                if number:
                    self._unsent[name] = self._unsent.get(name, 0) + number

    def take(self) -> dict[str, float]:
        """Return what was counted since the last time; whoever takes it adds it to the sums, or gives it back."""
        with self._lock:
            taken, self._unsent = self._unsent, {}
        return taken

    def give_back(self, taken: Mapping[str, float]) -> None:
        """Take back what could not be added to the sums."""
        self.update(taken)

    def after_fork(self) -> None:
        """Begin anew in a child: what was counted before is the parent's to send."""
        self._lock, self._unsent = Lock(), {}


def count_found(counters: Counters, tier: str, asked: int, found: Mapping[str, Entry]) -> None:
    """Count what a tier was asked for and had: hits (of what is fresh), misses, bytes, and the seconds saved."""
    fresh = [entry for entry in found.values() if entry.is_fresh]
    counters.update(
        {
            f"{tier}.hits": len(fresh),
            f"{tier}.misses": asked - len(fresh),
            f"{tier}.bytes": sum(len(entry.value or b"") for entry in fresh),
            f"{tier}.saved_s": sum(entry.cost_s for entry in fresh),
        }
    )
