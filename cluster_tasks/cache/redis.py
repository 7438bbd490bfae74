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

from cluster_tasks.cache.base import Cache, Reading, check_kept, check_keys, check_ttl
from cluster_tasks.cache.coherence import Coherence, State
from cluster_tasks.cache.connection import CacheConnection, Call, Command, Refusal, refused
from cluster_tasks.cache.counters import Counters, count_found
from cluster_tasks.cache.entry import Entry, as_bytes, pack, unpack
from cluster_tasks.cache.hot import HotKeys
from cluster_tasks.cache.leases import SHARED, SHARED_S, Leases, shared_token
from cluster_tasks.cache.patterns import beginning, compile_pattern, escape
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import script_source, text

logger = logging.getLogger(__name__)

AT_ONCE = 500
"""Keys of one pipeline."""
MAX_VALUE_BYTES = 16 << 20


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
    max_value_bytes: int = MAX_VALUE_BYTES
    """Of a value that is stored."""


def share(
    connection: CacheConnection, keys: Keys, clock: Clock, counters: Counters | None = None, hot: HotKeys | None = None,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> Shared:  # fmt: skip
    """Return what the namespaces on a connection share."""
    coherence = Coherence(connection, keys, clock)
    return Shared(connection, coherence, counters or Counters(), keys, clock, hot, max_value_bytes)


class RedisCache(Cache):
    """A namespace in Redis, in one behind Sentinel, or in a Redis Cluster. A hit takes one round trip."""

    def __init__(
        self, shared: Shared, namespace: str = "default", default_ttl_s: float = 3600.0, staleness_s: float = 1.0
    ) -> None:
        """``staleness_s``: how long others may see what was invalidated; with 0 nobody does, at no further cost."""
        super().__init__(namespace, default_ttl_s, shared.counters)
        self.shared, self.staleness_s = shared, staleness_s
        self._connection, self._keys = shared.connection, shared.keys
        shared.coherence.on_change(self._forget_flights, namespace)

    def read(self, keys: Iterable[str]) -> Reading:
        """As ``Cache.read``, in one round trip; while Redis is away, nothing is found."""
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
        """As ``Cache.write``; False while Redis is away or full, or if a value is too large."""
        keys, ttl_s, kept_s = check_keys(values), self._ttl(ttl_s), check_kept(kept_s)
        if not keys:
            return True
        values = {key: as_bytes(key, values[key]) for key in keys}
        too_large = self._too_large(values)
        entries = {key: Entry(value, ttl_s, ttl_s, kept_s, cost_s) for key, value in values.items()}
        try:
            if generation is not None:
                self._put(entries, too_large, generation, replaces)
            else:
                assumed = self.state().generation
                present = self._put(entries, too_large, assumed, replaces)
                if present not in (None, assumed):
                    # All was made void since the state was read, and with it what was just written.
                    self._put(entries, too_large, present, replaces)
        except CacheUnavailable as exc:
            logger.debug("not written: %s", exc)
            self.counters.add(redis_errors=1)
            return False
        self.counters.add(redis_writes=len(keys) - len(too_large))
        return not too_large

    def _put(self, entries: Mapping[str, Entry], too_large: set[str], generation: str, replaces: bool) -> str | None:
        """Write entries as of a generation; return the present one, as far as that was told."""
        # In the place of one that is too large nothing is there: the older one is void.
        calls: list[Call] = [
            ("remove", self._places(key), []) if key in too_large else
            ("put", self._places(key),
             [self._pack(key, replace(entry, generation=generation)), _milliseconds(entry.ttl_s + entry.kept_s)])
            for key, entry in entries.items()
        ]  # fmt: skip
        return self._change(calls, list(entries) if replaces else [])[1]

    def delete(self, *keys: str) -> int:
        """As ``Cache.delete``. Raises CacheUnavailable."""
        checked = check_keys(keys)
        return self._change([("remove", self._places(key), []) for key in checked], checked)[0]

    def expire(self, key: str, ttl_s: float) -> bool:
        """As ``Cache.expire``. Raises CacheUnavailable."""
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
        """As ``Cache.clear``: scans, a thousand keys at a time. Raises CacheUnavailable."""
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
        """As ``Cache.invalidate``: one new token. Raises CacheUnavailable."""
        self.shared.coherence.announce(self.namespace, None, new_generation=True)

    def lease(self, keys: Iterable[str], lease_s: float, *, by_force: bool = False) -> dict[str, str]:
        """As ``Cache.lease``: by the clock of Redis."""
        keys, rest = check_keys(keys), [_milliseconds(lease_s), SHARED, int(by_force)]
        taken = self._run([("lease", [self._lease(key)], [token_hex(8), *rest]) for key in keys])
        return {key: text(token) for key, token in zip(keys, taken, strict=True) if token}

    def hold(self, leases: Leases, lease_s: float, *, shared: bool = False) -> int:
        """As ``Cache.hold``."""
        lasts_ms = _milliseconds(lease_s)
        calls = [
            ("hold", [self._lease(key)], [token, lasts_ms, shared_token(token) if shared else token])
            for key, token in leases.items()
        ]
        return int(sum(self._run(calls)))

    def commit(self, leases: Leases, entries: Mapping[str, Entry], *, replaces: bool = False) -> int:
        """As ``Cache.commit``: of each key in one step with its lease."""
        too_large = self._too_large({key: entry.value for key, entry in entries.items()})
        if too_large and replaces:
            self.delete(*too_large)
        elif too_large:
            self.hold({key: leases[key] for key in too_large}, SHARED_S, shared=True)
        calls = [
            ("store", self._places(key),
             [leases[key], self._pack(key, entry), _milliseconds(entry.ttl_s + entry.kept_s)])
            for key, entry in entries.items() if key not in too_large
        ]  # fmt: skip
        stored, _ = self._change(calls, list(entries) if replaces else [])
        self.counters.add(redis_writes=stored, redis_refused=len(calls) - stored)
        return stored

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts, each on the keys of one slot; return what they returned. Raises CacheUnavailable."""
        if len(calls) == 1:
            return [self._connection.run(*calls[0])]
        return self._send([_command(*call) for call in calls], "scripts of the cache")

    def _change(self, calls: Sequence[Call], told: list[str]) -> tuple[int, str | None]:
        """Run scripts that change what is stored, and tell all processes of the keys.

        Return the sum of what the scripts returned, and the present generation, if any key was told.
        """
        coherence = self.shared.coherence
        if not told:
            return int(sum(self._run(calls))), None
        if self._connection.is_cluster:
            done = int(sum(self._run(calls)))
            return done, coherence.announce(self.namespace, told)
        # In one go: who dies after the change has told of it.
        *replies, message = self._run([*calls, coherence.announcement(self.namespace, told)])
        return int(sum(replies)), coherence.hear(message)

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
            # In this order: a value that is replaced in between gets what was left of the one before, never more.
            commands += [("PTTL", self._entry(key)), ("GET", self._entry(key))]
        try:
            replies = self._send(commands, "reading the cache", may_refuse=True)
        except CacheUnavailable:
            self.counters.give_back(counted)
            raise
        if state is None:
            self.counters.give_back(refused(counted, replies[1:]))
            if isinstance(replies[0], Refusal):
                raise CacheUnavailable(f"reading the state of {self.namespace}: {replies[0].reason}")
            generation, change = replies[0]
            if generation is None or change is None:
                # Nobody has used the namespace yet, or Redis needed the room.
                coherence.announce(self.namespace, None)
                return self._fetch(keys)
            state = coherence.learn(self.namespace, generation, change, asked_at_s)
        packed = {}
        for key, lives_ms, value in zip(keys, replies[ahead::2], replies[ahead + 1 :: 2], strict=True):
            refusal = next((reply for reply in (value, lives_ms) if isinstance(reply, Refusal)), None)
            if refusal is not None and not refusal.is_for_type:
                raise CacheUnavailable(f"reading {self.namespace}: {refusal.reason}")
            if value is not None:
                packed[key] = (value, lives_ms) if refusal is None else (b"", 0)
        return state, packed

    def _send(self, commands: Sequence[Command], doing: str, *, may_refuse: bool = False) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(commands), 2 * AT_ONCE):
            some = commands[start : start + 2 * AT_ONCE]
            replies += self._connection.pipeline(some, doing, may_refuse=may_refuse)
        return replies

    def _too_large(self, values: Mapping[str, bytes | None]) -> set[str]:
        """Return the keys of what must not be stored, and count them: it would drive out all others."""
        keys = {key for key, value in values.items() if len(value or b"") > self.shared.max_value_bytes}
        self.counters.add(redis_too_large=len(keys))
        return keys

    def _pack(self, key: str, entry: Entry) -> bytes:
        return pack(self._entry(key).encode(), entry)

    def _places(self, key: str) -> list[str]:
        return [self._entry(key), self._lease(key)]

    def _entry(self, key: str) -> str:
        return self._keys.cache_entry(self.namespace, key)

    def _lease(self, key: str) -> str:
        return self._keys.cache_lease(self.namespace, key)


def _command(script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Command:
    return ("EVAL", script_source(__package__, script), len(keys), *keys, *arguments)


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
