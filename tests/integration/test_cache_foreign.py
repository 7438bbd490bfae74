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
from workers.redis_server import RedisServer

KEYS = Keys()
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
