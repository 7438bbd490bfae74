"""What others wrote into the Redis of a cache, and what that Redis refuses, harms nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster_tasks.cache import Caches, create_caches
from cluster_tasks.clock import SystemClock
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.settings import ClusterSettings
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KEYS = Keys()
WITHIN_S = 10.0
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
        made.append(create_caches(ClusterSettings(cache_url=redis_server.url, **settings), KEYS, SystemClock()))
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
    other.namespace("y").get("k")
    wait_until(lambda: client.pubsub_numsub(KEYS.cache_changes)[0][1] == 2, WITHIN_S, "both listen")
    tells(one, other, b"2")
    tells(one, other, b"3")
