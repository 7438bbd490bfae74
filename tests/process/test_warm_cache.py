"""A node that joins has in its memory what its node, or all nodes, were asked for most, before it is given a job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster_tasks.cache.hot import HotKeys
from cluster_tasks.redis_store import connect
from tests.process.accounts import END_S
from tests.process.jobs import make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until
from workers.redis_server import RedisServer

COUNT = 40


@pytest.fixture
def cache_url(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> str:
    url = redis_server.url.replace("/0", "/1")
    monkeypatch.setenv("CLUSTER_CACHE_URL", url)
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    with connect(url) as client:
        client.flushdb()
    return url


def warmed(worker: WorkerProcess) -> list[int]:
    """How many values each process of a node began with, as the log tells."""
    return [int(number) for number in re.findall(r"(\d+) values of the cache are here", worker.read_log())]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_node_begins_with_what_was_asked_for_most(
    pool: str, redis_server: RedisServer, cache_url: str, tmp_path: Path
) -> None:
    jobs = make_jobs()
    cluster = jobs.cluster
    values = {f"key {number}": b"value" for number in range(COUNT)}
    cache = cluster.caches.namespace("hot")
    cache.set_many(values)
    cluster.caches.warm_for("a@test")
    for _ in range(4):
        # The first learns in which state the namespace is, the next brings the values here, and then they are hit.
        assert cache.get_many(values) == values
    cluster.caches.flush()
    cache.set_many({"cold": b"value"})

    worker = WorkerProcess("a", redis_server.url, tmp_path, pool=pool)
    with running(worker):
        assert jobs.work.delay(0.0, key="k").get(timeout=END_S)
        processes = 2 if pool == "prefork" else 1
        # Each process of a pool takes them in by itself, and one of them is enough for the job.
        wait_until(lambda: len(warmed(worker)) >= processes, END_S)
        assert warmed(worker)[:processes] == [COUNT] * processes
    other = WorkerProcess("never-heard-of", redis_server.url, tmp_path, pool=pool)
    with running(other):
        wait_until(lambda: len(warmed(other)) >= processes, END_S)
        assert set(warmed(other)) == {COUNT}, "a new node takes the hottest of all"
    wait_until(lambda: cluster.caches.sums().get("local.warmed", 0) >= COUNT, END_S)
    jobs.app.close()


def test_the_hottest_are_told_by_node_and_bounded(
    redis_server: RedisServer, cache_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster_tasks.cache.hot.KEPT", 10)
    monkeypatch.setattr("cluster_tasks.cache.hot.WARMED", 3)
    one, other = make_jobs(), make_jobs()
    for jobs, node, favourite in ((one, "a", "x"), (other, "b", "y")):
        caches = jobs.cluster.caches
        cache = caches.namespace("hot")
        caches.warm_for(node)
        cache.set_many({f"{favourite}{number}": b"v" for number in range(20)})
        for number in range(20):
            for _ in range(number + 2):
                cache.get(f"{favourite}{number}")
        caches.flush()
    for jobs, node, expected in ((one, "a", ["x19", "x18", "x17"]), (other, "b", ["y19", "y18", "y17"])):
        shared = jobs.cluster.caches.shared
        assert shared is not None
        assert isinstance(shared.hot, HotKeys)
        assert shared.hot.hottest() == [("hot", key) for key in expected]
        shared.hot.node_id = "c"
        assert {key[1:] for _, key in shared.hot.hottest()} <= {"19", "18"}
        with connect(cache_url) as client:
            assert client.zcard(jobs.cluster.keys.cache_hot(node, int(jobs.cluster.clock.time()) // 3600)) == 10
    for jobs in (one, other):
        jobs.app.close()
