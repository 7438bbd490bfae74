"""What locks in Redis promise besides, and what docs/locks.md advises."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from celery import Celery

from cluster_tasks.clock import SystemClock
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import LockLost, LockTaken
from cluster_tasks.keys import Keys
from cluster_tasks.locks import create_locks
from cluster_tasks.redis_store import connect
from tests.contract.locking import END_S, open_redis
from workers.redis_server import RedisServer


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with connect(redis_server.url) as client:
        yield client


def test_the_token_in_redis_grows_when_the_clock_is_set_back(redis_server: RedisServer, client: redis.Redis) -> None:
    locks = open_redis(redis_server.url)
    first = locks.acquire("name", ttl_s=60)
    seconds, microseconds = client.time()
    assert abs(first.token - (seconds * 1_000_000 + microseconds)) < END_S * 1_000_000
    # As if the clock had been an hour ahead until now.
    ahead = first.token + 3_600_000_000
    client.set(Keys("contract").lock_token, ahead)
    first.release()
    assert [locks.acquire(name, ttl_s=60).token for name in "abc"] == [ahead + 1, ahead + 2, ahead + 3]
    locks.close()


def test_the_token_in_redis_grows_although_all_is_lost(redis_server: RedisServer, client: redis.Redis) -> None:
    with closing(open_redis(redis_server.url)) as locks:
        first = locks.acquire("name", ttl_s=60)
        client.flushall()
        second = locks.acquire("name", ttl_s=60)
        assert second.token > first.token
        with pytest.raises(LockLost):
            first.renew()


def test_a_lock_survives_a_restart_of_redis_with_an_append_only_file(redis_binary: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path, appendonly=True) as server, closing(open_redis(server.url)) as locks:
        held = locks.acquire("name", ttl_s=60)
        server.stop()
        server.start()
        with pytest.raises(LockTaken):
            locks.acquire("name", ttl_s=60)
        held.renew()


def test_only_the_last_token_stays_in_redis(redis_server: RedisServer, client: redis.Redis) -> None:
    with closing(open_redis(redis_server.url)) as locks:
        held = locks.acquire("a*", ttl_s=60)
        assert sorted(client.scan_iter()) == [b"contract:lock:a%2A", b"contract:lock_token"]
        assert 0 < client.pttl("contract:lock:a%2A") <= 60_000
        held.release()
    assert list(client.scan_iter()) == [b"contract:lock_token"]
    assert client.ttl("contract:lock_token") == -1


def test_clusters_of_two_names_have_locks_of_their_own(redis_server: RedisServer) -> None:
    with closing(open_redis(redis_server.url, "a")) as one, closing(open_redis(redis_server.url, "b")) as other:
        one.acquire("name", ttl_s=60)
        other.acquire("name", ttl_s=60)


def test_a_cluster_has_its_locks_under_its_name(redis_url: str, client: redis.Redis) -> None:
    app = Celery("locked", broker=redis_url, set_as_current=False)
    app.conf.cluster_name = "shop"
    with Cluster(app).locks.acquire("name", ttl_s=60):
        assert client.exists("shop:lock:name")


@pytest.mark.parametrize("registry_url", [None, "memory://", "its own"])
def test_locks_live_where_the_registry_is_else_in_the_redis_of_the_broker(
    redis_server: RedisServer, client: redis.Redis, registry_url: str | None
) -> None:
    nowhere, own = "redis://127.0.0.1:1", registry_url == "its own"
    url = redis_server.url if own else registry_url
    made = create_locks(
        url, broker_url=nowhere if own else redis_server.url, keys=Keys("contract"), clock=SystemClock()
    )
    with closing(made) as locks:
        locks.acquire("name", ttl_s=60)
    assert client.exists("contract:lock:name")


# What docs/locks.md advises


def advised(language: str) -> str:
    text = (Path(__file__).parents[2] / "docs" / "locks.md").read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_statement_of_the_docs_refuses_a_lower_token() -> None:
    with closing(sqlite3.connect(":memory:")) as rows:
        rows.execute("CREATE TABLE shards (name TEXT, manifest TEXT, token BIGINT NOT NULL DEFAULT 0)")
        rows.execute("INSERT INTO shards (name) VALUES ('3')")

        def write(manifest: str, token: int) -> bool:
            values = {"name": "3", "manifest": manifest, "token": token}
            return rows.execute(advised("sql"), values).rowcount == 1

        assert [write("a", 7), write("b", 7), write("c", 2**62), write("d", 7)] == [True, True, True, False]
        assert rows.execute("SELECT manifest FROM shards").fetchall() == [("c",)]


def test_the_script_of_the_docs_refuses_a_lower_token(redis_server: RedisServer, client: redis.Redis) -> None:
    write = client.register_script(advised("lua"))
    with closing(open_redis(redis_server.url)) as locks:
        first = locks.acquire("name", ttl_s=60)
        assert write(["value", "token"], [first.token, "a"]) == 1
        first.release()
        second = locks.acquire("name", ttl_s=60)
        assert write(["value", "token"], [second.token, "b"]) == 1
        assert write(["value", "token"], [first.token, "c"]) == 0
    assert client.get("value") == b"b"
