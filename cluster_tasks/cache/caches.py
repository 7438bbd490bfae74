"""The namespaces of a cluster's cache."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator, Mapping
from threading import Lock
from weakref import WeakSet

from cluster_tasks.cache.base import Cache, check_namespace
from cluster_tasks.cache.connection import CacheConnection, Command, refused
from cluster_tasks.cache.counters import Counters
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.cache.hot import HotKeys
from cluster_tasks.cache.local import LocalCache, Memory
from cluster_tasks.cache.redis import RedisCache, Shared, share
from cluster_tasks.cache.tiered import TieredCache
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text
from cluster_tasks.settings import ClusterSettings

logger = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "default"
_open: WeakSet[Caches] = WeakSet()


class Caches:
    """Makes namespaces, each once for a process. Safe to share between threads, and in forked children."""

    def __init__(
        self, memory: Memory, shared: Shared | None, counters: Counters, ttl_s: float, staleness_s: float
    ) -> None:
        """``shared``: None means that each process has its own cache."""
        self.memory, self.shared, self.counters = memory, shared, counters
        self._ttl_s, self._staleness_s = ttl_s, staleness_s
        self._namespaces: dict[tuple[str, float], Cache] = {}
        self._lock = Lock()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin in a child without the locks of the parent's threads."""
        self._lock = Lock()

    def namespace(self, name: str = DEFAULT_NAMESPACE, *, tenant: str = "", staleness_s: float | None = None) -> Cache:
        """Return a namespace; one of a tenant is another than that of the same name of anybody else.

        ``staleness_s``, if given, stands for ``cluster_cache_staleness_s``; with 0 nobody sees what was invalidated,
        and every hit asks Redis. Raises ValueError for a name that cannot be.
        """
        if "/" in name or "/" in tenant:
            raise ValueError(f"namespace={name[:80]!r}, tenant={tenant[:80]!r} of a cache: no slash may be in them")
        full = check_namespace(f"{tenant}/{name}" if tenant else name)
        return self._namespace(full, self._staleness_s if staleness_s is None else staleness_s)

    def _namespace(self, full: str, staleness_s: float) -> Cache:
        with self._lock:
            made = self._namespaces.get((full, staleness_s))
            if made is None:
                made = self._namespaces[full, staleness_s] = self._make(full, staleness_s)
            return made

    def warm_for(self, node_id: str) -> int:
        """Take into this process what its node is asked for most, and tell from now on what it is asked for.

        Returns how many values that were: none while the cache is away.
        """
        hot = self.shared.hot if self.shared else None
        if hot is None:
            return 0
        hot.node_id = node_id
        by_namespace: dict[str, list[str]] = {}
        for name, key in hot.hottest():
            by_namespace.setdefault(name, []).append(key)
        caches = {name: self._namespace(name, self._staleness_s) for name in by_namespace}
        tiers = {name: cache for name, cache in caches.items() if isinstance(cache, TieredCache)}
        warmed = sum(cache.load(by_namespace[name]) for name, cache in tiers.items())
        self.flush()
        return warmed

    def sums(self) -> dict[str, float]:
        """What all processes have counted, as far as they have told, and Redis. Raises CacheUnavailable."""
        self.flush()
        if self.shared is None:
            return {}
        (counted,) = self.shared.connection.pipeline([("HGETALL", self.shared.keys.cache_counters)], "reading counters")
        sums, evictions = dict(_numbers(counted)), self.shared.connection.evictions()
        return sums if evictions is None else {**sums, "redis.evictions": float(evictions)}

    def flush(self) -> None:
        """Add what this process has counted to the sums; that is done with every reading of a state, too."""
        taken = self.counters.take()
        if self.shared is None:
            return
        sums, hot = self.shared.keys.cache_counters, self.shared.hot
        commands: list[Command] = [("HINCRBYFLOAT", sums, name, number) for name, number in taken.items()]
        commands += hot.due(at_once=True) if hot else []
        if not commands:
            return
        try:
            replies = self.shared.connection.pipeline(commands, "counting", may_refuse=True)
            self.counters.give_back(refused(taken, replies))
        except CacheUnavailable as exc:
            self.counters.give_back(taken)
            logger.debug("not counted yet: %s", exc)

    def close(self) -> None:
        """Close this process's connections. Safe to repeat; a later call opens them again."""
        if self.shared is not None:
            self.flush()
            self.shared.coherence.close()
            self.shared.connection.close()

    def _make(self, name: str, staleness_s: float) -> Cache:
        if self.shared is None:
            return LocalCache(self.memory, name, self._ttl_s)
        remote = RedisCache(self.shared, name, self._ttl_s, staleness_s)
        return TieredCache(self.memory, remote) if staleness_s else remote


def _numbers(counted: Mapping[bytes, bytes]) -> Iterator[tuple[str, float]]:
    for name, number in counted.items():
        try:
            yield text(name), float(number)
        except ValueError:  # Somebody else wrote it.
            continue


def create_caches(settings: ClusterSettings, keys: Keys, clock: Clock) -> Caches:
    """Return the caches of the settings. Does no I/O. Raises ConfigurationError for a URL that cannot be used."""
    counters = Counters()
    memory = Memory(clock, counters, settings.cache_local_entries, settings.cache_local_mb << 20)
    shared = None
    if settings.cache_url is not None:
        connection = CacheConnection(
            settings.cache_url.get_secret_value(), clock, timeout_s=settings.cache_timeout_s,
            sentinel_master=settings.sentinel_master,
        )  # fmt: skip
        hot = HotKeys(memory, connection, keys, clock)
        shared = share(connection, keys, clock, counters, hot, settings.cache_max_value_mb << 20)
    caches = Caches(memory, shared, counters, settings.cache_ttl_s, settings.cache_staleness_s)
    if shared is not None:
        _open.add(caches)
    return caches


@atexit.register
def _flush() -> None:
    for caches in list(_open):
        caches.flush()
