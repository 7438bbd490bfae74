"""What others wrote into the Redis of a cache, and what that Redis refuses, harms nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster_tasks.cache import Caches, Entry, create_caches
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.settings import ClusterSettings
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KEYS = Keys()
WITHIN_S = 120.0
MakeCaches = Callable[..., Caches]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Any]:
    """For what others write."""
    with connect(redis_server.url) as made:
        yield made


@pytest.fixture
def make_caches(redis_server: RedisServer) -> Iterator[MakeCaches]:
    """Makes caches as another process would have them."""
    made: list[Caches] = []

    def make(**settings: Any) -> Caches:
        given = {"cache_url": redis_server.url, "cache_timeout_s": 5, **settings}
        made.append(create_caches(ClusterSettings(**given), KEYS, SystemClock()))
        return made[-1]

    yield make
    for caches in made:
        caches.close()


@pytest.mark.parametrize(
    "member", [b"bad name!\0k", b"x\0", b"x", b"x\0" + b"k" * 2_000, b"\xff\xfe\0k", b"a/b/c\0k", b""]
)
def test_a_hot_key_that_cannot_be_is_passed_over(make_caches: MakeCaches, client: Any, member: bytes) -> None:
    caches = make_caches()
    caches.namespace("x").set("k", b"v")
    hour = int(time.time()) // 3600
    for period in (hour, hour + 1):
        client.zadd(KEYS.cache_hot("", period), {member: 5, b"x\0k": 1})
    assert caches.warm_for("a@test") == 1


@pytest.fixture
def pair(make_caches: MakeCaches, client: Any) -> tuple[Caches, Caches]:
    """The caches of two processes, which believe what they know for so long that only a message brings a change."""
    one, other = make_caches(cache_staleness_s=3_000), make_caches(cache_staleness_s=3_000)
    for caches in (one, other):
        caches.namespace("x").get("k")
    wait_until(lambda: client.pubsub_numsub(KEYS.cache_changes)[0][1] == 2, WITHIN_S, "both listen")
    return one, other


def tells(one: Caches, other: Caches, value: bytes) -> None:
    """Set a value in one process, and see that the other one hears of that."""
    one.namespace("x").set("k", value)
    wait_until(lambda: other.namespace("x").get("k") == value, WITHIN_S)


@pytest.mark.parametrize(
    "words",
    [b"", b"garbage", b"a b c 1", b"a b c {}", b'a b c ["x",[[1]]]', b'a b c ["x",1]', b'a b c [1,["k"]]',
     b'a b c ["",null]', b"\xff\xfe a b c", b"a b c " + b"[" * 100_000],
)  # fmt: skip
def test_a_message_of_somebody_else_ends_no_listening(pair: tuple[Caches, Caches], client: Any, words: bytes) -> None:
    one, other = pair
    tells(one, other, b"1")
    connections = client.info("stats")["total_connections_received"]
    client.publish(KEYS.cache_changes, words)
    tells(one, other, b"2")
    tells(one, other, b"3")
    assert client.info("stats")["total_connections_received"] == connections, "nobody had to listen anew"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_has_ended_is_started_again(pair: tuple[Caches, Caches], client: Any) -> None:
    one, other = pair
    assert other.shared is not None
    failures = [LookupError("of a drop")]

    def fail(namespace: str, keys: object) -> None:
        if failures:
            raise failures.pop()

    other.shared.coherence.on_change(fail)
    one.namespace("x").set("k", b"1")
    wait_until(lambda: client.pubsub_numsub(KEYS.cache_changes)[0][1] == 1, WITHIN_S, "one listener has ended")
    names = map(str, count())

    def both_listen() -> bool:
        # Its connection is closed a moment before the thread ends: only what is read after that begins it again.
        other.namespace(next(names)).get("k")
        return bool(client.pubsub_numsub(KEYS.cache_changes)[0][1] == 2)

    wait_until(both_listen, WITHIN_S, "both listen")
    tells(one, other, b"2")
    tells(one, other, b"3")


def test_an_entry_of_another_type_is_a_miss_until_it_is_set(make_caches: MakeCaches, client: Any) -> None:
    caches = make_caches(cache_staleness_s=0)
    cache, name = caches.namespace("x"), KEYS.cache_entry("x", "bad")
    cache.set("fine", b"v")
    client.lpush(name, "foreign")
    caches.counters.take()
    assert cache.get_many(["bad", "fine"]) == {"fine": b"v"}
    assert caches.counters.take()["redis.corrupt"] == 1
    assert not cache.expire("bad", 5)
    assert cache.get("fine") == b"v"
    assert cache.get_or_compute("bad", lambda: b"1") == b"1"
    assert cache.get("bad") == b"1"
    client.delete(name)
    client.lpush(name, "foreign")
    assert cache.set("bad", b"2")
    assert cache.get("bad") == b"2"


def test_counters_and_hot_keys_of_another_type_harm_no_reading(make_caches: MakeCaches, client: Any) -> None:
    caches = make_caches(cache_staleness_s=0)
    cache = caches.namespace("x")
    cache.set("k", b"v")
    hour = int(time.time()) // 3600
    client.hset(
        KEYS.cache_counters, mapping={"redis.hits": "many", "redis.misses": b"\xff", b"\xff": 1, "local.hits": 7}
    )
    for node, period in product(("", "a@test"), (hour, hour + 1)):
        client.set(KEYS.cache_hot(node, period), "foreign")
    assert caches.warm_for("a@test") == 0
    caches.memory.put("x", "k", Entry(b"v", 60, 60))
    caches.memory.get("x", "k")
    caches.flush()
    assert [cache.get("k") for _ in range(5)] == [b"v"] * 5
    sums = caches.sums()
    assert sums["local.hits"] == 7
    assert sums["redis.writes"] == 1, "what can be counted is"
    assert "redis.hits" not in sums
    client.delete(KEYS.cache_counters)
    assert caches.sums()["redis.hits"] == 5, "what could not be counted is counted later"
    client.set(name := KEYS.cache_counters, "foreign")
    with pytest.raises(CacheUnavailable):
        caches.sums()
    client.delete(name)
    assert cache.get("k") == b"v"


def test_a_state_of_another_type_harms_its_namespace_alone(make_caches: MakeCaches, client: Any) -> None:
    caches = make_caches(cache_staleness_s=0)
    cache, other = caches.namespace("x"), caches.namespace("other")
    other.set("k", b"v")
    client.set(KEYS.cache_state("x"), "foreign")
    assert (cache.get("k"), cache.set("k", b"v"), cache.get_or_compute("k", lambda: b"2")) == (None, False, b"2")
    with pytest.raises(CacheUnavailable):
        cache.invalidate()
    assert other.get("k") == b"v"


@pytest.fixture(params=["without room", "read-only"])
def refusing(request: pytest.FixtureRequest, redis_binary: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a Redis that has a value under k of x, and refuses to write."""
    extra = ["maxmemory 4mb", "maxmemory-policy noeviction"]
    with RedisServer(tmp_path / "one", extra=extra) as server, connect(server.url) as client:
        caches = create_caches(ClusterSettings(cache_url=server.url, cache_timeout_s=5), KEYS, SystemClock())
        assert caches.namespace("x").set("k", b"v", 600)
        caches.close()
        if request.param == "without room":
            is_full = False
            while not is_full:
                try:
                    client.rpush("room", b"x" * 10_000)
                except redis.exceptions.OutOfMemoryError:
                    is_full = True
            yield server.url
            return
        with (
            RedisServer(tmp_path / "replica", extra=[f"replicaof 127.0.0.1 {server.port}"]) as replica,
            connect(replica.url) as other,
        ):
            wait_until(lambda: other.exists(KEYS.cache_entry("x", "k")), WITHIN_S)
            yield replica.url


def test_a_redis_that_refuses_to_write_is_read(refusing: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = ClusterSettings(cache_url=refusing, cache_staleness_s=0, cache_timeout_s=5)
    caches = create_caches(settings, KEYS, SystemClock())
    cache = caches.namespace("x")
    for number in range(5):
        assert cache.get_or_compute(f"none {number}", lambda: b"computed") == b"computed"
        assert cache.get("k") == b"v"
        assert not cache.set("other", b"w")
    assert cache.get_or_compute("k", lambda: b"computed") == b"v"
    for promise in (lambda: cache.delete("k"), cache.invalidate, lambda: cache.clear("none*")):
        with pytest.raises(CacheUnavailable):
            promise()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == len(set(warnings))
    assert all("refused" in warning for warning in warnings), "it is told once, and not taken for an outage"
    caches.close()


def test_a_lease_of_somebody_else_that_never_runs_out_keeps_nobody_waiting(
    make_caches: MakeCaches, client: Any
) -> None:
    client.set(KEYS.cache_lease("x", "k"), "for ever")
    assert make_caches().namespace("x").get_or_compute("k", lambda: b"v") == b"v"
