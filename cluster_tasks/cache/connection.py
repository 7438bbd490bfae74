"""The Redis that a cache lives in: one server, one behind Sentinel, or a Redis Cluster.

A cache that is away must cost nothing: after one short time-out it is left alone for a while. That it refuses a
command, as the key is of another type, or there is no room, or it is a replica, says nothing of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from cluster_tasks.addresses.redis import CACHE_CLUSTER_SCHEMES, parse_cluster_url
from cluster_tasks.breaker import Breaker, BreakerPolicy, Outcome, Phase
from cluster_tasks.cache.forks import renewed_after_fork
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.redis_store import connect, load_script

logger = logging.getLogger(__name__)

LEFT_ALONE_S = 2.0
"""How long a cache that did not answer is not asked."""
SCRIPTS = ("announce", "hold", "lease", "put", "remove", "store")
ATTEMPTS_MORE = 1
"""How often a command is sent again when a Redis Cluster has lost a master, to whoever took its place."""

OUTAGES = (redis.exceptions.ClusterDownError, redis.exceptions.AuthenticationWrongNumberOfArgsError)
"""Replies of a server that does nothing for us; redis-py makes others of them errors of the connection."""

Command = tuple[Any, ...]
Call = tuple[str, Sequence[str], Sequence[Any]]
"""A script of this package, its keys, which are all in one slot, and its arguments."""
Client = redis.Redis | RedisCluster
_POLICY = BreakerPolicy(
    failure_threshold=1, success_threshold=1, timeout_s=LEFT_ALONE_S, window=1, probe_lease_s=LEFT_ALONE_S
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Stands for the reply to a command that Redis refused."""

    reason: str

    @property
    def is_for_type(self) -> bool:
        """Whether what is under the key is of another type: somebody else wrote it."""
        return self.reason.startswith("WRONGTYPE")


def refused(sent: Mapping[str, float], replies: Sequence[Any]) -> dict[str, float]:
    """Return what of ``sent`` was refused, by the replies to its commands and any that follow."""
    return {
        name: number for (name, number), reply in zip(sent.items(), replies, strict=False) if isinstance(reply, Refusal)
    }


class CacheConnection:
    """Sends commands to the Redis of a cache. Safe to share between threads, and in forked children.

    Every method raises CacheUnavailable: after one time-out, at once while the cache is left alone, and for what Redis
    refuses.
    """

    def __init__(self, url: str, clock: Clock, *, timeout_s: float = 0.5, sentinel_master: str = "mymaster") -> None:
        """Does no I/O. Raises ConfigurationError for a URL that cannot be used."""
        self.is_cluster = url.partition("://")[0] in CACHE_CLUSTER_SCHEMES
        self._make = _maker(url, timeout_s, sentinel_master)
        self._clock, self._timeout_s = clock, timeout_s
        self._lock = Lock()
        self._breaker = Breaker(_POLICY, clock)
        self._told: set[tuple[type, str]] = set()
        """The kinds of refusals that are in the log."""
        renewed_after_fork(self)

    def pipeline(self, commands: Sequence[Command], doing: str, *, may_refuse: bool = False) -> list[Any]:
        """Send commands in one round trip, in a Redis Cluster one to each master concerned; return their replies.

        ``may_refuse``: in the place of the reply to a command that is refused is a Refusal.
        """
        with self._asking(doing):
            pipe = self.client.pipeline(transaction=False) if not self.is_cluster else self.client.pipeline()
            for command in commands:
                pipe.execute_command(*command)
            replies: list[Any] = pipe.execute(raise_on_error=False)
            errors = [reply for reply in replies if isinstance(reply, Exception)]
            if outages := [error for error in errors if _is_outage(error)]:
                raise outages[0]
            if errors and not may_refuse:
                raise errors[0]
        return [self._refusal(reply, doing) if isinstance(reply, Exception) else reply for reply in replies]

    def run(self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, insist: bool = False) -> Any:
        """Run a script of this package, all of whose keys are in one slot; with ``insist`` never without an attempt."""
        with self._asking(f"cache script {script}", insist=insist):
            return self._scripts[script](keys, arguments)

    def scan(self, pattern: str) -> Iterator[list[str]]:
        """Yield the keys of every master that match, some at a time; one that comes or goes meanwhile may be missed."""
        with self._asking("scanning the cache"):
            masters = [self.client.get_redis_connection(node) for node in self._masters()] or [self.client]
        for master in masters:
            cursor = None
            while cursor != 0:
                with self._asking("scanning the cache"):
                    cursor, keys = master.scan(cursor or 0, match=pattern, count=1000)
                yield [key.decode(errors="replace") for key in keys]

    def evictions(self) -> int | None:
        """Return how many keys the masters have evicted since they began; None: this user may not ask."""
        with self._asking("reading statistics of the cache"):
            masters = [self.client.get_redis_connection(node) for node in self._masters()] or [self.client]
            try:
                return sum(int(master.info("stats")["evicted_keys"]) for master in masters)
            except redis.exceptions.NoPermissionError:
                return None

    def subscribe(self, channel: str) -> redis.client.PubSub:
        """Return a subscription to a channel; it has a connection of its own. Raises redis.RedisError as well."""
        with self._asking("subscribing to the cache"):
            subscription: redis.client.PubSub = self.client.pubsub()
            subscription.subscribe(channel)
            return subscription

    @property
    def is_left_alone(self) -> bool:
        """Whether it would not be asked now."""
        return self._breaker.phase is not Phase.CLOSED

    @property
    def client(self) -> Any:
        """The client of this process. Raises CacheUnavailable if a Redis Cluster cannot be reached."""
        # Finding a Redis Cluster may take a while, and who waits for that has no time for an attempt of his own.
        if not self._lock.acquire(timeout=self._timeout_s):
            raise redis.ConnectionError("the cache is being looked for")
        try:
            return self._client
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close this process's connections. Safe to repeat; a later call opens them again."""
        with self._lock:
            client = self.__dict__.pop("_client", None)
            self.__dict__.pop("_scripts", None)
        if client is not None:
            client.close()

    def after_fork(self) -> None:
        """Begin in a child with connections of its own."""
        self._lock = Lock()
        self._breaker = Breaker(_POLICY, self._clock)
        # Not closed: the connections are the parent's.
        self.__dict__.pop("_client", None)
        self.__dict__.pop("_scripts", None)

    @cached_property
    def _client(self) -> Client:
        return self._make()

    @cached_property
    def _scripts(self) -> dict[str, Callable[..., Any]]:
        return {name: load_script(self.client, __package__, name) for name in SCRIPTS}

    def _masters(self) -> Iterable[ClusterNode]:
        return self.client.get_primaries() if self.is_cluster else ()

    @contextmanager
    def _asking(self, doing: str, *, insist: bool = False) -> Iterator[None]:
        permit = self._breaker.admit()
        if permit is None and not insist:
            raise CacheUnavailable(f"{doing}: the cache did not answer lately and is left alone")
        outcome = Outcome.UNKNOWN
        try:
            yield
            outcome = Outcome.SUCCESS
        except (redis.RedisError, RedisClusterException, OSError) as exc:
            outcome = Outcome.FAILURE
            if not _is_outage(exc):
                outcome = Outcome.SUCCESS
                self._refusal(exc, doing)
            raise CacheUnavailable(f"{doing}: {type(exc).__name__}: {exc}") from exc
        finally:
            news = self._breaker.record(permit, outcome) if permit is not None else None
            if news is Phase.OPEN:
                logger.warning("cache unavailable, jobs run without it: %s", doing)
            elif news is Phase.CLOSED:
                logger.info("cache available again")

    def _refusal(self, error: Exception, doing: str) -> Refusal:
        kind = type(error), str(error).partition(" ")[0]
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("the cache refused a command, jobs run on: %s: %s", doing, error)
        return Refusal(str(error))


def _is_outage(error: Exception) -> bool:
    """Whether an error says that nothing can be asked of the cache; if not, it is about one command."""
    return (
        not isinstance(error, redis.ResponseError)
        or isinstance(error, OUTAGES)
        # A script of somebody else does not end.
        or str(error).startswith("BUSY ")
    )


def _maker(url: str, timeout_s: float, sentinel_master: str) -> Callable[[], Client]:
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if url.partition("://")[0] not in CACHE_CLUSTER_SCHEMES:
        # Without health checks: they would be a second round trip.
        client = connect(url, sentinel_master=sentinel_master, health_check_interval=0, **options)
        client.close()
        return lambda: connect(url, sentinel_master=sentinel_master, health_check_interval=0, **options)
    nodes, access = parse_cluster_url(url)
    return lambda: RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in nodes],
        retry=Retry(NoBackoff(), ATTEMPTS_MORE),
        # A part that is down must not take the rest with it.
        require_full_coverage=False,
        **access,
        **options,
    )
