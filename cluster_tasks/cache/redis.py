"""A namespace in Redis, seen by all processes.

What is read is believed if its head and checksum are right and its generation is the present one; all else is a miss.
The present generation comes with the same round trip when what is known of it is older than ``staleness_s``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

from cluster_tasks.cache.base import Cache, Reading, check_keys, check_ttl
from cluster_tasks.cache.coherence import Coherence, State
from cluster_tasks.cache.connection import CacheConnection, Command
from cluster_tasks.cache.counters import Counters, count_found
from cluster_tasks.cache.entry import Entry, pack, unpack
from cluster_tasks.cache.hot import HotKeys
from cluster_tasks.cache.leases import Leases
from cluster_tasks.cache.patterns import beginning, compile_pattern, escape
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import script_source

logger = logging.getLogger(__name__)

AT_ONCE = 500
"""Keys of one pipeline."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all namespaces of a process share."""

    connection: CacheConnection
    coherence: Coherence
    counters: Counters
    keys: Keys
    clock: Clock
    hot: HotKeys | None = None
    """None: nobody is told what is asked for most."""


def share(
    connection: CacheConnection, keys: Keys, clock: Clock, counters: Counters | None = None, hot: HotKeys | None = None
) -> Shared:
    """Return what the namespaces on a connection share."""
    return Shared(connection, Coherence(connection, keys, clock), counters or Counters(), keys, clock, hot)


class RedisCache(Cache):
    """A namespace in Redis, in one behind Sentinel, or in a Redis Cluster. A hit takes one round trip."""

    def __init__(
        self, shared: Shared, namespace: str = "default", default_ttl_s: float = 3600.0, staleness_s: float = 1.0
    ) -> None:
        """``staleness_s``: how long others may see what was invalidated; with 0 nobody does, at no further cost."""
        super().__init__(namespace, default_ttl_s, shared.counters)
        self.shared, self.staleness_s = shared, staleness_s
        self._connection, self._keys = shared.connection, shared.keys

    def read(self, keys: Iterable[str]) -> Reading:
        keys = check_keys(keys)
        reading = self.look(keys)
        count_found(self.counters, "redis", len(keys), reading.entries)
        return reading

    def look(self, keys: list[str]) -> Reading:
        """As ``read``, and it counts neither as a hit nor as a miss."""
        try:
            state, packed = self._fetch(keys)
        except CacheUnavailable as exc:
            logger.debug("read as if it was empty: %s", exc)
            self.counters.add(redis_errors=1)
            return Reading({}, None)
        found, corrupt = {}, 0
        for key, (value, lives_ms) in packed.items():
            entry = unpack(self._entry(key).encode(), value, lives_ms / 1000)
            corrupt += entry is None
            if entry is not None and entry.generation == state.generation:
                found[key] = entry
        self.counters.add(redis_corrupt=corrupt)
        return Reading(found, state.generation)

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
        keys, ttl_s = check_keys(values), self._ttl(ttl_s)
        if not keys:
            return True
        try:
            entry = Entry(b"", ttl_s, ttl_s, kept_s, cost_s, generation or self.state().generation)
            lives_ms = _milliseconds(ttl_s + kept_s)
            commands: list[Command] = []
            for key in keys:
                packed = self._pack(key, replace(entry, value=values[key]))
                commands += [("SET", self._entry(key), packed, "PX", lives_ms), ("DEL", self._lease(key))]
            self._send(commands, "writing to the cache")
            if replaces:
                self.shared.coherence.announce(self.namespace, keys)
        except CacheUnavailable as exc:
            logger.debug("not written: %s", exc)
            self.counters.add(redis_errors=1)
            return False
        self.counters.add(redis_writes=len(keys))
        return True

    def delete(self, *keys: str) -> int:
        checked = check_keys(keys)
        commands = [("DEL", name) for key in checked for name in (self._entry(key), self._lease(key))]
        removed = self._send(commands, "deleting from the cache")[::2]
        self.shared.coherence.announce(self.namespace, checked)
        return int(sum(removed))

    def expire(self, key: str, ttl_s: float) -> bool:
        check_keys([key])
        check_ttl(ttl_s)
        state, packed = self._fetch([key])
        value, lives_ms = packed.get(key, (b"", 0))
        entry = unpack(self._entry(key).encode(), value, lives_ms / 1000)
        if entry is None or entry.generation != state.generation:
            return False
        command = ("PEXPIRE", self._entry(key), _milliseconds(ttl_s + entry.kept_s))
        (done,) = self._send([command], "setting a TTL in the cache")
        self.shared.coherence.announce(self.namespace, [key])
        return bool(done)

    def clear(self, pattern: str = "*") -> int:
        matches = compile_pattern(pattern).fullmatch
        cleared = 0
        for place, count in ((self._keys.cache_lease, 0), (self._keys.cache_entry, 1)):
            prefix, suffix = place(self.namespace, "\0").split("\0")
            scanned = escape(prefix + beginning(pattern)) + "*"
            for names in self._connection.scan(scanned):
                found = {name for name in names if name.startswith(prefix) and name.endswith(suffix)}
                mine = [name for name in found if matches(name[len(prefix) : len(name) - len(suffix)])]
                for start in range(0, len(mine), AT_ONCE):
                    commands = [("UNLINK", name) for name in mine[start : start + AT_ONCE]]
                    cleared += count * sum(self._send(commands, "clearing the cache"))
        self.shared.coherence.announce(self.namespace, None)
        return cleared

    def invalidate(self) -> None:
        self.shared.coherence.announce(self.namespace, None, new_generation=True)

    def lease(self, keys: Iterable[str], lease_s: float) -> dict[str, str]:
        tokens = {key: token_hex(8) for key in check_keys(keys)}
        lasts_ms = _milliseconds(lease_s)
        commands = [("SET", self._lease(key), token, "NX", "PX", lasts_ms) for key, token in tokens.items()]
        taken = self._send(commands, "taking leases in the cache")
        return {key: token for (key, token), mine in zip(tokens.items(), taken, strict=True) if mine}

    def hold(self, leases: Leases, lease_s: float) -> int:
        lasts_ms = _milliseconds(lease_s)
        return self._run_each("hold", [([self._lease(key)], [token, lasts_ms]) for key, token in leases.items()])

    def commit(self, leases: Leases, entries: Mapping[str, Entry]) -> int:
        calls = [
            ([self._entry(key), self._lease(key)],
             [leases[key], self._pack(key, entry), _milliseconds(entry.ttl_s + entry.kept_s)])
            for key, entry in entries.items()
        ]  # fmt: skip
        stored = self._run_each("store", calls)
        self.counters.add(redis_writes=stored, redis_refused=len(calls) - stored)
        return stored

    def _run_each(self, script: str, calls: list[tuple[list[str], list[Any]]]) -> int:
        """Run a script for each of some keys and arguments; return the sum of what it returned."""
        if len(calls) == 1:
            return int(self._connection.run(script, *calls[0]))
        text = script_source(__package__, script)
        commands = [("EVAL", text, len(keys), *keys, *arguments) for keys, arguments in calls]
        return int(sum(self._send(commands, f"cache script {script}")))

    def state(self) -> State:
        """Return the state of the namespace, not older than ``staleness_s``. Raises CacheUnavailable."""
        return self.shared.coherence.known(self.namespace, self.staleness_s) or self._fetch([])[0]

    def _fetch(self, keys: list[str]) -> tuple[State, dict[str, tuple[bytes, int]]]:
        """Return the state, and for each key that is there its value and for how many milliseconds Redis keeps it."""
        coherence = self.shared.coherence
        state = coherence.known(self.namespace, self.staleness_s)
        asked_at_s = self.shared.clock.monotonic()
        commands: list[Command] = []
        counted: dict[str, float] = {}
        if state is None:
            commands.append(("HMGET", self._keys.cache_state(self.namespace), "generation", "change"))
            counted = self.counters.take()
            sums = self._keys.cache_counters
            commands += [("HINCRBYFLOAT", sums, name, number) for name, number in counted.items()]
            commands += self.shared.hot.due() if self.shared.hot else []
        ahead = len(commands)
        for key in keys:
            commands += [("GET", self._entry(key)), ("PTTL", self._entry(key))]
        try:
            replies = self._send(commands, "reading the cache")
        except CacheUnavailable:
            self.counters.give_back(counted)
            raise
        if state is None:
            generation, change = replies[0]
            if generation is None or change is None:
                # Nobody has used the namespace yet, or Redis needed the room.
                coherence.announce(self.namespace, None)
                return self._fetch(keys)
            state = coherence.learn(self.namespace, generation, change, asked_at_s)
        found = zip(keys, replies[ahead::2], replies[ahead + 1 :: 2], strict=True)
        return state, {key: (value, lives_ms) for key, value, lives_ms in found if value is not None}

    def _send(self, commands: Sequence[Command], doing: str) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(commands), 2 * AT_ONCE):
            replies += self._connection.pipeline(commands[start : start + 2 * AT_ONCE], doing)
        return replies

    def _pack(self, key: str, entry: Entry) -> bytes:
        return pack(self._entry(key).encode(), entry)

    def _entry(self, key: str) -> str:
        return self._keys.cache_entry(self.namespace, key)

    def _lease(self, key: str) -> str:
        return self._keys.cache_lease(self.namespace, key)


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
