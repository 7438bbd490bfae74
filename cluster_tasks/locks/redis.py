"""Locks in Redis: a key with a TTL that holds the token, and one number for the last token of all locks.

A Redis that fails over, or restarts without its last second, can forget a lock that somebody holds and give it to
another. Then two hold it, and only the token tells them apart: it is microseconds by Redis' clock, but always more
than the last one, so it grows although the number was lost, as long as the clock of the new server is not further
behind than the time between the two acquisitions.
"""

from __future__ import annotations

from math import inf
from typing import Any

import redis

from cluster_tasks.errors import LocksUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.locks.base import Grant
from cluster_tasks.redis_store import connect, foreign_errors, load_script, text

SCANNED_AT_ONCE = 1_000
NO_END = -1
"""What Redis tells of a key that does not expire."""


class RedisLocks:
    """A ``LockStore`` in Redis 6.2 or later. TTLs are exact to the millisecond."""

    def __init__(self, store: str | redis.Redis, keys: Keys) -> None:
        """Use the Redis at the URL or of the client ``store``. Does no I/O."""
        self._client = connect(store) if isinstance(store, str) else store
        self._keys = keys
        self._scripts = {name: load_script(self._client, __package__, name) for name in ("take", "renew", "release")}

    def take(self, key: str, ttl_s: float) -> Grant | None:
        """As ``LockStore.take``, in one script, which also makes the token."""
        token = self._run("take", [self._keys.lock(key), self._keys.lock_token], [_milliseconds(ttl_s)])
        return Grant(key, int(token), ttl_s) if token else None

    def renew(self, grant: Grant) -> bool:
        """As ``LockStore.renew``, in one script, which compares the token."""
        return bool(self._run("renew", [self._keys.lock(grant.key)], [grant.token, _milliseconds(grant.ttl_s)]))

    def release(self, grant: Grant) -> bool:
        """As ``LockStore.release``, in one script, which compares the token."""
        return bool(self._run("release", [self._keys.lock(grant.key)], [grant.token]))

    def held(self) -> dict[str, float | None]:
        """As ``LockStore.held``."""
        prefix = self._keys.lock("")
        with foreign_errors(LocksUnavailable, "looking for locks"), self._client.pipeline(transaction=False) as pipe:
            found = [text(key) for key in self._client.scan_iter(match=f"{prefix}*", count=SCANNED_AT_ONCE)]
            for key in found:
                pipe.pttl(key)
            left_ms = pipe.execute() if found else []
        left_s = {key.removeprefix(prefix): _left_s(ms) for key, ms in zip(found, left_ms, strict=True)}
        return {key: left for key, left in left_s.items() if left}

    def close(self) -> None:
        """As ``LockStore.close``."""
        self._client.connection_pool.disconnect(inuse_connections=False)

    def _run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        with foreign_errors(LocksUnavailable, f"lock script {script}"):
            return self._scripts[script](keys, arguments)


def _left_s(left_ms: int) -> float:
    """Return what PTTL tells in seconds: 0 if the key is gone."""
    return inf if left_ms == NO_END else max(left_ms, 0) / 1000


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
