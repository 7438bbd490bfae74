"""The cache seam: bytes under keys, each for a time. What a key is missing is computed again, so nothing here is lost.

``get_or_compute`` is what most callers want: of all that miss a key at once, in the cluster, one computes it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from cluster_tasks.cache.counters import Counters
from cluster_tasks.cache.entry import Entry
from cluster_tasks.cache.flight import Flights, Refresh, compute_missing
from cluster_tasks.cache.leases import Leases, Values
from cluster_tasks.cache.warming import BATCH, Loader, Warmed, warm
from cluster_tasks.settings import LONGEST_TTL_S

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,128}(/[A-Za-z0-9_.-]{1,128})?")
"""With a tenant before the slash, if any."""
LONGEST_KEY = 1024
"""Bytes."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found under some keys, and when."""

    entries: Mapping[str, Entry]
    """Those that were found, stale ones among them."""
    generation: str | None
    """Of the namespace, as far as it is known. What is computed from now on is stored as of this generation."""


class Cache(ABC):
    """One namespace of a cache. Safe to share between threads, and in forked children.

    Keys are text of 1 to 1,024 bytes, with any characters; values are bytes, and a bytearray or memoryview is copied;
    TTLs are seconds, None stands for ``default_ttl_s``. Bad keys and TTLs raise ValueError, other values TypeError. A
    cache that is away is a miss for whoever reads or writes. Only what promises that an old value is gone (``delete``,
    ``expire``, ``clear``, ``invalidate``) raises CacheUnavailable.
    """

    def __init__(self, namespace: str, default_ttl_s: float, counters: Counters) -> None:
        self.namespace, self.default_ttl_s = check_namespace(namespace), check_ttl(default_ttl_s)
        self.counters = counters

    @abstractmethod
    def read(self, keys: Iterable[str]) -> Reading:
        """Return the entries of some keys, stale ones as well. Never raises for want of Redis."""

    @abstractmethod
    def write(
        self,
        values: Mapping[str, bytes | None],
        ttl_s: float | None = None,
        *,
        kept_s: float = 0.0,
        cost_s: float = 0.0,
        generation: str | None = None,
        replaces: bool = True,
    ) -> bool:
        """Store values; return whether that was done. Raises TypeError for what is like no bytes.

        They are fresh for ``ttl_s`` and kept for ``kept_s`` more; None says that there is no such thing. ``generation``
        is that of the reading that was computed from; None: the present one. ``replaces``: other values may be there,
        and every process is told to forget them.
        """

    @abstractmethod
    def delete(self, *keys: str) -> int:
        """Forget keys everywhere; return how many there were.

        What is being computed for them is not stored either, nor given to anybody who asks after that. So it is for
        whatever ``clear`` and ``invalidate`` make void, too.
        """

    @abstractmethod
    def expire(self, key: str, ttl_s: float) -> bool:
        """Let a key be fresh for ``ttl_s`` from now on; False if it is not there."""

    @abstractmethod
    def clear(self, pattern: str = "*") -> int:
        """Delete the keys that match a pattern of ``cache.patterns``; return how many. Looks at every key."""

    @abstractmethod
    def invalidate(self) -> None:
        """Make all of the namespace void, and what is being computed for it: at once, however much it holds."""

    # One computation in the cluster.

    @abstractmethod
    def lease(self, keys: Iterable[str], lease_s: float, *, by_force: bool = False) -> dict[str, str]:
        """Take the right to compute keys, for ``lease_s``; return the tokens of those that nobody else has.

        ``by_force`` takes it from whoever has it, whose value is not stored then. Raises CacheUnavailable.
        """

    @abstractmethod
    def hold(self, leases: Leases, lease_s: float, *, shared: bool = False) -> int:
        """Let leases last longer, or give them back with 0; return how many stood. Raises CacheUnavailable.

        One that is ``shared`` is had by all who ask for it.
        """

    @abstractmethod
    def commit(self, leases: Leases, entries: Mapping[str, Entry], *, replaces: bool = False) -> int:
        """Store what was computed under leases, and give those back; return how many.

        The other keys were changed meanwhile. ``replaces`` is as in ``write``. Raises CacheUnavailable.
        """

    @cached_property
    def _flights(self) -> Flights:
        return Flights(self)

    def _forget_flights(self, _: str, keys: Sequence[str] | None) -> None:
        self._flights.forget(keys)

    def get_or_compute(
        self,
        key: str,
        compute: Callable[[], bytes | None],
        ttl_s: float | None = None,
        *,
        refresh: Refresh = Refresh.IN_TIME,
        kept_s: float = 0.0,
        negative_ttl_s: float | None = None,
        among: str = "",
    ) -> bytes | None:
        """Return the value of a key; what is missing is computed by one caller in the cluster, and the others wait.

        A value that was fresh less than ``kept_s`` ago is returned at once while one caller computes it anew, and
        one that soon will not be fresh may be computed before. None is an answer: it is stored for
        ``negative_ttl_s``, if given. Raises what ``compute`` raises; all that wait in this process get that, too.
        What is not stored, or fails, lets all who wait compute at once. Callers of another ``among`` are given what is
        stored, and neither an error nor what is not. Raises RuntimeError if ``compute`` asks for its own key, and
        TypeError if it returns no bytes.
        """
        check_keys([key])
        ttl_s, negative_ttl_s = self._ttl(ttl_s), check_ttl(negative_ttl_s) if negative_ttl_s else None
        return self._flights.get(key, compute, ttl_s, refresh, check_kept(kept_s), negative_ttl_s, among)

    def get_or_compute_many(
        self, keys: Iterable[str], compute: Callable[[list[str]], Values], ttl_s: float | None = None
    ) -> dict[str, bytes]:
        """Return the values of keys; what is missing is computed, each key by one caller in the cluster.

        ``compute`` is given the missing keys that nobody else computes, and returns what there is of them; it is called
        again for what another did not get done. Raises what it raises.
        """
        return compute_missing(self, check_keys(keys), compute, self._ttl(ttl_s))

    def warm(
        self, loader: Loader, keys: Iterable[str], ttl_s: float | None = None, *, batch: int = BATCH,
        progress: bool = False,
    ) -> Warmed:  # fmt: skip
        """Load what is missing of some keys and store it, ``batch`` keys at a time; ``progress`` shows a bar.

        ``loader`` is given the missing keys of a batch and returns what there is of them. Raises what it raises; what
        was loaded before stays.
        """
        return warm(self, loader, keys, self._ttl(ttl_s), batch, progress)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None if there is none that is fresh."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return the values that are there, by their keys."""
        found = self.read(keys).entries
        return {key: entry.value for key, entry in found.items() if entry.is_fresh and entry.value is not None}

    def exists(self, key: str) -> bool:
        """Whether there is a value that is fresh."""
        return self.get(key) is not None

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> bool:
        """Store a value; return whether that was done."""
        return self.write({key: value}, ttl_s)

    def set_many(self, values: Mapping[str, bytes], ttl_s: float | None = None) -> bool:
        """Store values; return whether all were."""
        return self.write(values, ttl_s)

    def get_json(self, key: str) -> Any:
        """Return what ``set_json`` stored; None if there is nothing, or nothing that is JSON."""
        value = self.get(key)
        try:
            return None if value is None else json.loads(value)
        except ValueError:
            return None

    def set_json(self, key: str, value: Any, ttl_s: float | None = None) -> bool:
        """Store what JSON can say. Raises TypeError and ValueError for anything else."""
        return self.set(key, json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), ttl_s)

    def get_vector(self, key: str) -> NDArray[np.float32] | None:
        """Return what ``set_vector`` stored, an array of one dimension that cannot be written to."""
        value = self.get(key)
        return None if value is None else vector(value)

    def set_vector(self, key: str, values: Any, ttl_s: float | None = None) -> bool:
        """Store numbers of one dimension as float32, four bytes each."""
        return self.set(key, vector_bytes(values), ttl_s)

    def _ttl(self, ttl_s: float | None) -> float:
        return self.default_ttl_s if ttl_s is None else check_ttl(ttl_s)


def vector(value: bytes) -> NDArray[np.float32] | None:
    """Read a vector of little-endian float32; None for bytes that are none."""
    import numpy as np

    return np.frombuffer(value, dtype="<f4") if len(value) % 4 == 0 else None


def vector_bytes(values: Any) -> bytes:
    """Write a vector down as little-endian float32. Raises ValueError for another shape."""
    import numpy as np

    array = np.asarray(values, dtype="<f4")
    if array.ndim != 1:
        raise ValueError(f"expected a vector, an array of one dimension, not of shape {array.shape}")
    return array.tobytes()


def check_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys as a list. Raises ValueError for one that cannot be a key."""
    checked = list(keys)
    for key in checked:
        try:
            size = len(key.encode())
        except (AttributeError, UnicodeEncodeError):
            size = 0
        if not 0 < size <= LONGEST_KEY:
            raise ValueError(
                f"key={str(key)[:60]!r} of a cache: expected text of 1 to {LONGEST_KEY} bytes; of longer ones, a digest"
            )
    return checked


def check_namespace(name: str) -> str:
    """Return the name of a namespace. Raises ValueError for one that could be taken for another, or a key."""
    if not NAMESPACE.fullmatch(name):
        raise ValueError(f"namespace={name[:80]!r} of a cache: expected {NAMESPACE.pattern}")
    return name


def check_kept(kept_s: float) -> float:
    """Return for how many seconds a value is kept when it is stale. Raises ValueError for what cannot be."""
    if not 0 <= kept_s <= LONGEST_TTL_S:
        raise ValueError(f"kept_s={kept_s!r} of a cache: expected seconds between 0 and {LONGEST_TTL_S:g}")
    return kept_s


def check_ttl(ttl_s: float) -> float:
    """Return a TTL in seconds. Raises ValueError for one that cannot be."""
    if not 0.001 <= ttl_s <= LONGEST_TTL_S:
        raise ValueError(f"ttl_s={ttl_s!r} of a cache: expected seconds between 0.001 and {LONGEST_TTL_S:g}")
    return ttl_s
