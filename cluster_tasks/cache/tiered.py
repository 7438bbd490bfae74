"""Two tiers: what was read from Redis is kept in the process, and dropped when it is void.

What the process holds is served without asking Redis for as long as the state of the namespace was read within
``staleness_s``: that bounds how long anybody sees a value that was replaced, whatever messages are lost. When Redis
is away, what the process holds is not served past that either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from cluster_tasks.cache.base import Cache, Reading, check_keys
from cluster_tasks.cache.counters import count_found
from cluster_tasks.cache.entry import Entry
from cluster_tasks.cache.leases import Leases
from cluster_tasks.cache.local import Memory
from cluster_tasks.cache.redis import RedisCache
from cluster_tasks.errors import CacheUnavailable

LOCAL_S = 60.0
"""How long the process keeps a value before it asks Redis again, as a second bound."""
LARGEST_LOCAL = 1 << 20
"""Bytes."""
MayBeLocal = Callable[[str, Entry], bool]


def is_small(key: str, entry: Entry) -> bool:
    """The common policy: every value of up to 1 MiB may be kept in the process."""
    return len(entry.value or b"") <= LARGEST_LOCAL


class TieredCache(Cache):
    """A namespace in the process and in Redis. ``may_be_local`` says what of it the process keeps."""

    def __init__(
        self, memory: Memory, shared: RedisCache, may_be_local: MayBeLocal = is_small, local_s: float = LOCAL_S
    ) -> None:
        super().__init__(shared.namespace, shared.default_ttl_s, shared.counters)
        self.memory, self.redis, self._may_be_local, self._local_s = memory, shared, may_be_local, local_s
        shared.shared.coherence.on_change(memory.forget)
        shared.shared.coherence.on_change(self._forget_flights, self.namespace)

    def read(self, keys: Iterable[str]) -> Reading:
        """As ``Cache.read``: from memory what is known to stand, all else from Redis."""
        keys = check_keys(keys)
        memory, name, coherence = self.memory, self.namespace, self.redis.shared.coherence
        held = {key: entry for key in keys if (entry := memory.get(name, key)) is not None and entry.is_fresh}
        if not held:
            count_found(self.counters, "local", len(keys), {})
            return self._read_shared(keys)
        state = coherence.known(name, self.redis.staleness_s)
        if state is None:
            try:
                state = self.redis.state()
            except CacheUnavailable:
                count_found(self.counters, "local", len(keys), {})
                return Reading({}, None)
            # Reading it may have shown that something is void.
            held = {key: entry for key in held if (entry := memory.get(name, key)) is not None and entry.is_fresh}
        held = {key: entry for key, entry in held.items() if entry.generation == state.generation}
        count_found(self.counters, "local", len(keys), held)
        if len(held) == len(keys):
            return Reading(held, state.generation)
        reading = self._read_shared([key for key in keys if key not in held])
        if reading.generation != state.generation:
            return reading
        return Reading({**held, **reading.entries}, state.generation)

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
        """As ``Cache.write``: to Redis; memory forgets."""
        written = self.redis.write(
            values, ttl_s, kept_s=kept_s, cost_s=cost_s, generation=generation, replaces=replaces
        )
        # It is not known what a write that failed has done.
        self.memory.forget(self.namespace, values)
        return written

    def delete(self, *keys: str) -> int:
        """As ``Cache.delete``. Raises CacheUnavailable."""
        return self.redis.delete(*keys)

    def expire(self, key: str, ttl_s: float) -> bool:
        """As ``Cache.expire``. Raises CacheUnavailable."""
        return self.redis.expire(key, ttl_s)

    def clear(self, pattern: str = "*") -> int:
        """As ``Cache.clear``. Raises CacheUnavailable."""
        return self.redis.clear(pattern)

    def invalidate(self) -> None:
        """As ``Cache.invalidate``. Raises CacheUnavailable."""
        self.redis.invalidate()

    def lease(self, keys: Iterable[str], lease_s: float, *, by_force: bool = False) -> dict[str, str]:
        """As ``Cache.lease``: that of Redis."""
        return self.redis.lease(keys, lease_s, by_force=by_force)

    def hold(self, leases: Leases, lease_s: float, *, shared: bool = False) -> int:
        """As ``Cache.hold``: that of Redis."""
        return self.redis.hold(leases, lease_s, shared=shared)

    def commit(self, leases: Leases, entries: Mapping[str, Entry], *, replaces: bool = False) -> int:
        """As ``Cache.commit``: to Redis; memory forgets."""
        stored = self.redis.commit(leases, entries, replaces=replaces)
        self.memory.forget(self.namespace, entries)
        return stored

    def load(self, keys: Sequence[str]) -> int:
        """Take keys into the process before somebody asks for them; return how many were there and may be."""
        try:
            # To learn it drops all, and what was on its way with it.
            self.redis.state()
        except CacheUnavailable:
            return 0
        before = len(self.memory.places(self.namespace))
        self._take_in(check_keys(keys), self.redis.look)
        loaded = len(self.memory.places(self.namespace)) - before
        self.counters.add(local_warmed=loaded)
        return loaded

    def _read_shared(self, keys: list[str]) -> Reading:
        return self._take_in(keys, self.redis.read)

    def _take_in(self, keys: list[str], read: Callable[[list[str]], Reading]) -> Reading:
        # Taken before: what is forgotten while the reply is on its way must not come back with it.
        era, asked_at_s = self.memory.era(self.namespace), self.redis.shared.clock.monotonic()
        reading = read(keys)
        for key, entry in reading.entries.items():
            if entry.is_fresh and self._may_be_local(key, entry):
                kept = replace(entry, kept_s=0.0)
                self.memory.put(self.namespace, key, kept, era, as_of_s=asked_at_s, for_s=self._local_s)
        return reading
