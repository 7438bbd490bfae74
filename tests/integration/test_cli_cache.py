"""``celery -A APP cluster cache …``, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from cluster_tasks.cache import Caches
from tests.process.jobs import make_jobs
from workers.redis_server import RedisServer, free_port

END_S = 60.0


def run(*words: str, exit_code: int = 0) -> Any:
    """Run the command with --json; return what it printed, of one that fails its words."""
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "cache", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == exit_code, done.stderr
    return json.loads(done.stdout) if exit_code == 0 else done.stderr


@pytest.fixture
def caches(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caches]:
    """Of the app; the commands of the test use the same."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_CACHE_URL", redis_server.url)
    jobs = make_jobs()
    yield jobs.cluster.caches
    jobs.cluster.caches.close()
    jobs.app.close()


def test_a_value_is_shown_and_deleted(caches: Caches) -> None:
    cache = caches.namespace("reports", tenant="acme")
    cache.set("a\x1b[31m*", b"text \xff", 60)
    shown = run("get", "a\x1b[31m*", "--namespace", "acme/reports")
    assert (shown["bytes"], shown["value"]) == (6, "text \ufffd")
    assert 0 < shown["left_s"] <= 60
    assert "there is no 'none'" in run("get", "none", exit_code=1)
    assert run("delete", "a\x1b[31m*", "none", "--namespace", "acme/reports") == {"deleted": 1}
    assert cache.redis.get("a\x1b[31m*") is None  # type: ignore[attr-defined]


def test_what_matches_is_cleared_and_only_when_that_is_wanted(caches: Caches) -> None:
    cache, other = caches.namespace(), caches.namespace("other")
    for one in (cache, other):
        one.set_many({"a1": b"1", "a2": b"2", "b1": b"3"})
    run("clear", "a*", exit_code=1)
    assert run("clear", "a*", "--yes") == {"cleared": 2}
    assert run("clear", "--yes") == {"cleared": 1}
    assert len(other.get_many(["a1", "a2", "b1"])) == 3
    assert "expected" in run("clear", "--yes", "--namespace", "a:b", exit_code=1)
    assert "is not closed" in run("clear", "[a", "--yes", exit_code=1)


def test_the_counts_of_all_processes_are_shown(caches: Caches) -> None:
    cache = caches.namespace()
    cache.get_or_compute("k", lambda: b"12345")
    for _ in range(3):
        cache.get("k")
    caches.flush()
    told = run("stats")
    assert told["redis"]["hits"] == 1
    assert told["local"]["hits"] == 2
    assert (told["local"]["bytes"], told["values"]["computed"]) == (10, 1)
    assert 0 < told["local"]["hit_percent"] < 100


def test_a_cache_that_is_not_there_is_told(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_CACHE_URL", f"redis://127.0.0.1:{free_port()}/0")
    for words in (["stats"], ["delete", "k"], ["clear", "--yes"]):
        assert "onnection" in run(*words, exit_code=69)
    monkeypatch.setenv("CLUSTER_CACHE_URL", "http://host")
    assert "CLUSTER_CACHE_URL" in run("stats", exit_code=1)
    monkeypatch.delenv("CLUSTER_CACHE_URL")
    assert "set cluster_cache_url" in run("stats", exit_code=1)
