"""Everything that is the same for each use of Redis: clients, scripts, errors."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit, urlunsplit
from weakref import WeakSet

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.commands.core import Script
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from cluster_tasks.addresses.redis import DEFAULT_PORT
from cluster_tasks.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from redis.asyncio import Redis as AsyncRedis

SOCKET_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0
HEALTH_CHECK_S = 3
PASSING_REFUSALS = (
    redis.exceptions.ReadOnlyError, redis.exceptions.OutOfMemoryError, redis.exceptions.MasterDownError,
    redis.exceptions.TryAgainError,
)  # fmt: skip
"""What redis-py makes of the words of a server that cannot do a command now."""
PASSING_WORDS = ("READONLY", "LOADING", "OOM", "MASTERDOWN", "NOREPLICAS", "BUSY", "MISCONF")
"""Those words; Redis 6.2 tells the error of a command in a script within words of its own."""

_pools: WeakSet[redis.ConnectionPool] = WeakSet()


class _Pool(redis.ConnectionPool):
    """A pool that learns from one connection that broke.

    The idle ones are older and may lead to the same server that has fallen silent: each would cost a time-out more.
    """

    def release(self, connection: Any) -> None:
        is_broken = not connection.is_connected
        super().release(connection)
        if is_broken:
            self.disconnect(inuse_connections=False)


class _SentinelPool(_Pool, SentinelConnectionPool):
    """The same behind Redis Sentinel."""


def _renew_pool_locks() -> None:
    # After a fork redis-py empties a pool under the pool's inherited lock. If a thread of the parent held it at the
    # fork, nobody in the child releases it.
    for pool in _pools:
        pool._lock = RLock()


os.register_at_fork(after_in_child=_renew_pool_locks)


def connect(url: str, *, sentinel_master: str = "mymaster", **options: Any) -> redis.Redis:
    """Return a client for ``redis://``, ``rediss://``, ``redis+socket://`` or ``sentinel://`` (hosts joined by ``;``).

    Does no I/O. The client never repeats a command by itself: a script whose reply was lost may have run, and
    only its caller knows whether it can run again.
    """
    settings: dict[str, Any] = {**_settings(), "retry": Retry(NoBackoff(), 0), **options}
    client = (
        _behind_sentinel(url, sentinel_master, settings) if url.startswith("sentinel://") else _direct(url, settings)
    )
    _pools.add(client.connection_pool)
    return client


@asynccontextmanager
async def connect_async(url: str, *, sentinel_master: str = "mymaster", **options: Any) -> AsyncIterator[AsyncRedis]:
    """A client for asyncio, as ``connect`` makes one for threads, while the block lasts; for one event loop."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.asyncio.sentinel import Sentinel as AsyncSentinel

    settings: dict[str, Any] = {**_settings(), "retry": AsyncRetry(NoBackoff(), 0), **options}
    sentinels: list[Any] = []
    if url.startswith("sentinel://"):
        hosts, access = _parse_sentinel_url(url)
        sentinel = AsyncSentinel(hosts, **settings)
        sentinels = sentinel.sentinels
        client: AsyncRedis = sentinel.master_for(sentinel_master, **access, **settings)
    else:
        with _url_errors():
            client = Redis.from_url(_plain(url, settings), **settings)
    try:
        yield client
    finally:
        for each in (client, *sentinels):
            await each.aclose()


def _settings() -> dict[str, Any]:
    return {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
    }


def _direct(url: str, settings: dict[str, Any]) -> redis.Redis:
    with _url_errors():
        return redis.Redis.from_pool(_Pool.from_url(_plain(url, settings), **settings))


@contextmanager
def _url_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as exc:
        raise ConfigurationError(f"a Redis URL cannot be used: {exc}") from None


def _plain(url: str, settings: dict[str, Any]) -> str:
    """Return a URL as redis-py writes it; what is not for its kind of connection is taken out of the settings."""
    if not url.startswith("redis+socket://"):
        return url
    del settings["socket_connect_timeout"], settings["socket_keepalive"]
    return "unix://" + url.removeprefix("redis+socket://").replace("virtual_host=", "db=")


def _behind_sentinel(url: str, master: str, settings: dict[str, Any]) -> redis.Redis:
    hosts, access = _parse_sentinel_url(url)
    sentinel = Sentinel(hosts, **settings)
    return sentinel.master_for(  # type: ignore[no-any-return]
        master, redis.Redis, _SentinelPool, **access, **settings
    )


def _parse_sentinel_url(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Return the addresses of the Sentinels, and the database and login of the Redis behind them."""
    parts = [urlsplit(part) for part in url.split(";")]
    hosts = [(part.hostname or "127.0.0.1", part.port or 26379) for part in parts]
    database = next((part.path.strip("/") for part in parts if part.path.strip("/")), "0")
    if not database.isdigit():
        raise ConfigurationError(f"the database of a sentinel:// URL is a number, not {database!r}")
    return hosts, {"db": int(database), "username": parts[0].username, "password": parts[0].password}


def database_of(url: str) -> int:
    """The number of the database that a Redis URL names; 0 if it names none."""
    first = urlsplit(url.split(";")[0])
    named = parse_qs(first.query).get("virtual_host") or [first.path.strip("/")]
    return int(named[0]) if named[0].isdigit() else 0


def is_same_server(url: str, other: str) -> bool:
    """Whether two Redis URLs are of one server, and differ at most by the database."""
    return _without_database(url) == _without_database(other)


def _without_database(url: str) -> str:
    if url.startswith("redis+socket://"):
        return re.sub(r"[?&]virtual_host=\d*", "", url)
    return ";".join(_server(part) for part in url.split(";"))


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss") and not re.search(r":\d+$", parts.netloc):
        parts = parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{DEFAULT_PORT}")
    return urlunsplit(parts._replace(path=""))


def script_source(package: str, name: str) -> str:
    """Return the text of ``scripts/<name>.lua`` beside ``package``."""
    return (files(package) / "scripts" / f"{name}.lua").read_text(encoding="utf-8")


class RememberedScript(Script):
    """A script that runs however often Redis forgets it."""

    def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        try:
            return super().__call__(keys, args, client)
        except redis.exceptions.NoScriptError:
            # Forgotten again between the two steps of redis-py, which are to load it and to run it.
            keys, args = keys or (), args or ()
            return (client or self.registered_client).eval(str(self.script), len(keys), *keys, *args)


class ScriptCall(NamedTuple):
    """A script and what it is called with: by itself, or in one round trip with others."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Any]

    def run(self) -> Any:
        """Call it now. Raises redis.RedisError."""
        return self.script(self.keys, self.arguments)

    def add_to(self, pipe: Pipeline) -> None:
        """Call it when ``pipe`` is executed; what it returns is one of the answers."""
        self.script(self.keys, self.arguments, pipe)


def run_together(client: redis.Redis, calls: Iterable[ScriptCall]) -> list[Any]:
    """Call scripts together and return what each returned; others may come in between. Raises redis.RedisError."""
    with client.pipeline(transaction=False) as pipe:
        for call in calls:
            call.add_to(pipe)
        return pipe.execute()


def load_script(client: redis.Redis, package: str, name: str) -> Script:
    """Return ``scripts/<name>.lua`` of ``package`` as a callable; it is sent again when Redis has forgotten it."""
    return RememberedScript(client, script_source(package, name))


def run_script(client: redis.Redis, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Call a script as ``script(keys, arguments)`` does, at two thirds of its cost: for what runs with every job.

    Left out are redis-py's own repeats and measurements. Only a script that Redis has forgotten, and so not run, is
    sent again. Raises redis.RedisError.
    """
    connection = client.connection_pool.get_connection()
    try:
        connection.send_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        return connection.read_response()
    except redis.exceptions.NoScriptError:
        connection.send_command("EVAL", script.script, len(keys), *keys, *arguments)
        return connection.read_response()
    finally:
        client.connection_pool.release(connection)


def is_passing_refusal(exc: BaseException | None) -> bool:
    """Whether an error is the refusal of a server that cannot do a command now, and may soon."""
    return isinstance(exc, redis.ResponseError) and (
        isinstance(exc, PASSING_REFUSALS) or any(word in str(exc) for word in PASSING_WORDS)
    )


@contextmanager
def refusals_as_outages(client: redis.Redis) -> Iterator[None]:
    """Turn the refusal of a server that cannot work now into the loss of the connection: Celery tries again after it.

    After that, and after a loss, the next command makes a new connection, maybe to another server.
    """
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError):
        client.connection_pool.disconnect(inuse_connections=False)
        raise
    except redis.ResponseError as exc:
        if not is_passing_refusal(exc):
            raise
        client.connection_pool.disconnect()
        raise redis.ConnectionError(f"Redis refused a command: {exc}") from exc


@contextmanager
def foreign_errors(unavailable: type[UnavailableError], doing: str) -> Iterator[None]:
    """Turn an error of Redis into ``unavailable``, with what was being done."""
    try:
        yield
    except redis.RedisError as exc:
        raise unavailable(f"{doing}: {type(exc).__name__}: {exc}") from exc


def text(value: bytes | str) -> str:
    """Decode what Redis holds as text."""
    return value.decode() if isinstance(value, bytes) else value
