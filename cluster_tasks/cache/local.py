"""The cache of one process: the least recently used goes when there is no room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import nlargest
from math import inf
from operator import itemgetter
from secrets import token_hex
from threading import RLock

from cluster_tasks.cache.base import Cache, Reading, check_kept, check_keys, check_ttl
from cluster_tasks.cache.counters import Counters, count_found
from cluster_tasks.cache.entry import Entry, as_bytes
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.cache.leases import SHARED, Leases, shared_token
from cluster_tasks.cache.patterns import compile_pattern
from cluster_tasks.clock import Clock

OVERHEAD_BYTES = 600
"""About what an entry takes besides its key and value."""
ERAS = 1024
"""Namespaces share them: who has heard of ever more of them does not take ever more room."""
Place = tuple[str, str]
"""Namespace and key."""


@dataclass(slots=True)
class _Held:
    entry: Entry
    as_of_s: float
    """When the entry was as it says, by the monotonic clock."""
    until_s: float
    """When it is forgotten, however long it is fresh."""
    hits: int = 0
    """Since they were taken last."""


class Memory:
    """Entries of all namespaces, bounded by their number and by bytes. Safe to share between threads.

    A child that this process forks begins with none.
    """

    def __init__(self, clock: Clock, counters: Counters, max_entries: int = 10_000, max_bytes: int = 64 << 20) -> None:
        if max_entries < 1 or max_bytes < 1:
            raise ValueError(f"local cache: max_entries={max_entries}, max_bytes={max_bytes}: expected 1 or more")
        self._clock, self._counters, self._max_entries, self._max_bytes = clock, counters, max_entries, max_bytes
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin empty: what the parent holds may change while nobody tells this process."""
        self._lock = RLock()
        self._entries: OrderedDict[Place, _Held] = OrderedDict()
        self._keys: dict[str, set[str]] = {}
        """Of each namespace of which there is an entry."""
        self._bytes = 0
        self._eras = [0] * ERAS

    @property
    def bytes(self) -> int:
        """What the entries take."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, namespace: str, key: str) -> Entry | None:
        """Return an entry that is kept still."""
        with self._lock:
            found = self._entries.get((namespace, key))
            if found is None:
                return None
            now_s = self._clock.monotonic()
            entry = found.entry.after(now_s - found.as_of_s)
            if entry.left_s + entry.kept_s <= 0 or now_s >= found.until_s:
                self._remove((namespace, key))
                return None
            self._entries.move_to_end((namespace, key))
            found.hits += 1
            return entry

    def era(self, namespace: str) -> int:
        """A number that grows whenever something of the namespace is forgotten on demand, and maybe more often."""
        return self._eras[hash(namespace) % ERAS]

    def put(
        self, namespace: str, key: str, entry: Entry, era: int | None = None, *, as_of_s: float | None = None,
        for_s: float = inf,
    ) -> bool:  # fmt: skip
        """Put an entry as it was ``as_of_s``, now by default, for so long at most.

        It is left out if it takes more than all the room or ``era`` is over.
        """
        since_s = self._clock.monotonic() if as_of_s is None else as_of_s
        place, size = (namespace, key), _size(namespace, key, entry)
        with self._lock:
            if era is not None and era != self.era(namespace):
                return False
            self._remove(place)
            if size > self._max_bytes:
                return False
            self._entries[place] = _Held(entry, since_s, since_s + for_s)
            self._keys.setdefault(namespace, set()).add(key)
            self._bytes += size
            evicted = 0
            while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
                self._remove(next(iter(self._entries)))
                evicted += 1
        self._counters.add(local_evictions=evicted)
        return True

    def forget(self, namespace: str, keys: Iterable[str] | None) -> int:
        """Forget keys, or a whole namespace, or with "" all; return how many there were."""
        with self._lock:
            for number in [hash(namespace) % ERAS] if namespace else range(ERAS):
                self._eras[number] += 1
            places = self.places(namespace) if keys is None else [(namespace, key) for key in keys]
            return sum(self._remove(place) for place in places)

    def take_hottest(self, most: int) -> list[tuple[Place, int]]:
        """Return what was got most often since the last time, and how often."""
        with self._lock:
            hits = [(place, held.hits) for place, held in self._entries.items() if held.hits]
            for place, _ in hits:
                self._entries[place].hits = 0
        return nlargest(most, hits, key=itemgetter(1))

    def places(self, namespace: str) -> list[Place]:
        """Where entries of a namespace are, or with "" of all."""
        with self._lock:
            return [(namespace, key) for key in self._keys.get(namespace, ())] if namespace else list(self._entries)

    def _remove(self, place: Place) -> bool:
        found = self._entries.pop(place, None)
        if found is None:
            return False
        self._bytes -= _size(*place, found.entry)
        namespace, key = place
        keys = self._keys[namespace]
        keys.discard(key)
        if not keys:
            del self._keys[namespace]
        return True


class LocalCache(Cache):
    """A namespace in the memory of this process; other processes do not see it."""

    def __init__(self, memory: Memory, namespace: str = "default", default_ttl_s: float = 3600.0) -> None:
        super().__init__(namespace, default_ttl_s, memory._counters)
        self.memory = memory
        self._generation = token_hex(8)
        self._lock, self._leases = RLock(), dict[str, tuple[str, float]]()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin in a child without the locks and leases of the parent's threads."""
        self._lock, self._leases = RLock(), {}

    def read(self, keys: Iterable[str]) -> Reading:
        """As ``Cache.read``, from the memory of this process."""
        keys = check_keys(keys)
        found = {key: entry for key in keys if (entry := self.memory.get(self.namespace, key)) is not None}
        count_found(self.counters, "local", len(keys), found)
        return Reading(found, self._generation)

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
        """As ``Cache.write``; what is older goes when there is no room."""
        values = {key: as_bytes(key, values[key]) for key in check_keys(values)}
        ttl_s, kept_s = self._ttl(ttl_s), check_kept(kept_s)
        with self._lock:
            if generation not in (None, self._generation):
                return False
            for key in values:
                self._leases.pop(key, None)
            entries = {key: Entry(value, ttl_s, ttl_s, kept_s, cost_s) for key, value in values.items()}
            return sum(self.memory.put(self.namespace, key, entry) for key, entry in entries.items()) == len(values)

    def delete(self, *keys: str) -> int:
        """As ``Cache.delete``; of this process, for no other has it."""
        check_keys(keys)
        with self._lock:
            for key in keys:
                self._leases.pop(key, None)
            forgotten = self.memory.forget(self.namespace, keys)
        self._flights.forget(keys)
        return forgotten

    def expire(self, key: str, ttl_s: float) -> bool:
        """As ``Cache.expire``."""
        check_keys([key])
        check_ttl(ttl_s)
        with self._lock:
            entry = self.memory.get(self.namespace, key)
            if entry is None:
                return False
            return self.memory.put(self.namespace, key, replace(entry, ttl_s=ttl_s, left_s=ttl_s))

    def clear(self, pattern: str = "*") -> int:
        """As ``Cache.clear``."""
        matches = compile_pattern(pattern).fullmatch
        with self._lock:
            self._leases = {key: lease for key, lease in self._leases.items() if not matches(key)}
            keys = [key for _, key in self.memory.places(self.namespace) if matches(key)]
            forgotten = self.memory.forget(self.namespace, keys)
        self._flights.forget(None)
        return forgotten

    def invalidate(self) -> None:
        """As ``Cache.invalidate``."""
        with self._lock:
            self._generation = token_hex(8)
            self._leases.clear()
            self.memory.forget(self.namespace, None)
        self._flights.forget(None)

    def lease(self, keys: Iterable[str], lease_s: float, *, by_force: bool = False) -> dict[str, str]:
        """As ``Cache.lease``, among the threads of this process."""
        checked, now_s, leases = check_keys(keys), self.memory._clock.monotonic(), dict[str, str]()
        with self._lock:
            for key in checked:
                token, until_s = self._leases.get(key, ("", now_s))
                if by_force or until_s <= now_s:
                    leases[key] = token_hex(8)
                    self._leases[key] = leases[key], now_s + lease_s
                elif token.startswith(SHARED):
                    leases[key] = token
        return leases

    def hold(self, leases: Leases, lease_s: float, *, shared: bool = False) -> int:
        """As ``Cache.hold``."""
        until_s = self.memory._clock.monotonic() + lease_s
        with self._lock:
            held = {key: token for key, token in leases.items() if self._leases.get(key, ("",))[0] == token}
            for key, token in held.items():
                if lease_s > 0:
                    self._leases[key] = shared_token(token) if shared else token, until_s
                else:
                    del self._leases[key]
            return len(held)

    def commit(self, leases: Leases, entries: Mapping[str, Entry], *, replaces: bool = False) -> int:
        """As ``Cache.commit``."""
        with self._lock:
            return sum(self._commit(key, leases[key], entry) for key, entry in entries.items())

    def _commit(self, key: str, token: str, entry: Entry) -> bool:
        return bool(self.hold({key: token}, 0)) and self.write(
            {key: entry.value}, entry.ttl_s, kept_s=entry.kept_s, cost_s=entry.cost_s, generation=entry.generation
        )


def _size(namespace: str, key: str, entry: Entry) -> int:
    return len(namespace) + len(key) + len(entry.value or b"") + OVERHEAD_BYTES
