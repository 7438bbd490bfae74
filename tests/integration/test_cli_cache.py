"""``celery -A APP cluster cache …``, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster_tasks.cache import Caches
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from tests.process.jobs import make_jobs
from workers.redis_server import RedisServer, free_port

END_S = 120.0


def run(*words: str, exit_code: int = 0) -> Any:
    """Run the command with --json; return what it printed, of one that fails its words."""
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "cache", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if exit_code == 0 else done.stderr


@pytest.fixture
def caches(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caches]:
    """Of the app; the commands of the test use the same."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_CACHE_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_CACHE_TIMEOUT_S", "5")
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


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["get", ""], "key='' of a cache: expected text of 1 to 1024 bytes"),
        (["get", "k" * 1_025], "of a cache: expected text of 1 to 1024 bytes"),
        (["delete", "k", ""], "key='' of a cache: expected text of 1 to 1024 bytes"),
        (["clear", "[a"], "pattern '[a': a [ is not closed"),
        (["clear", "a\\", "--yes"], "ends with a backslash"),
        (["get", "k", "--namespace", "/reports"], "namespace='/reports' of a cache"),
        (["delete", "k", "--namespace", "acme/"], "namespace='acme/' of a cache"),
        (["clear", "--yes", "--namespace", ""], "namespace='' of a cache"),
    ],
)
def test_what_cannot_be_an_argument_is_refused_in_one_line(caches: Caches, words: list[str], reason: str) -> None:
    (line,) = run(*words, exit_code=1).splitlines()
    assert line.startswith("Error: ")
    assert reason in line


def test_a_question_and_its_answer_are_on_lines_of_their_own_in_a_pipe(caches: Caches) -> None:
    caches.namespace().set("k", b"v")
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "cache", "clear"]
    for answer, last in (("n\n", "Aborted!"), ("", "Aborted!"), ("y\n", "1 cleared")):
        done = subprocess.run(
            command,
            input=answer,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=END_S,
            check=False,
        )
        question, *_, said = done.stdout.splitlines()
        assert (question, said) == ("Forget what matches * in default? [y/N]: ", last)


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


def test_what_redis_has_evicted_is_told(redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path, extra=["maxmemory 4mb", "maxmemory-policy allkeys-lru"]) as server:
        monkeypatch.setenv("CLUSTER_BROKER_URL", server.url)
        monkeypatch.setenv("CLUSTER_CACHE_URL", server.url)
        assert run("stats")["redis"]["evictions"] == 0
        with connect(server.url) as client:
            for number in range(1_000):
                client.set(f"room:{number}", b"x" * 10_000)
            told = run("stats")
            assert 0 < told["redis"]["evictions"] <= client.info("stats")["evicted_keys"]
            assert told["local"]["evictions"] == 0
            client.execute_command("ACL", "SETUSER", "default", "-info")
            assert run("stats")["redis"]["evictions"] is None, "who may not ask does not know"


def test_counters_that_somebody_else_wrote_are_not_told(caches: Caches, redis_server: RedisServer) -> None:
    with connect(redis_server.url) as client:
        client.hset(Keys().cache_counters, mapping={"redis.hits": "many", "redis.misses": 3})
    told = run("stats")
    assert (told["redis"]["hits"], told["redis"]["misses"]) == (0, 3)


def test_a_cache_that_is_not_there_is_told(
    caches: Caches, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    monkeypatch.setenv("CLUSTER_CACHE_URL", url)
    texts = tmp_path / "texts"
    texts.write_text("a text")
    for words in (["stats"], ["get", "k"], ["delete", "k"], ["clear", "--yes"], ["warm", str(texts)]):
        told = run(*words, exit_code=69)
        assert "onnection" in told
        assert f"(is the cache up at {url}? CLUSTER_CACHE_URL names another)" in told
        assert redis_server.url not in told
    monkeypatch.setenv("CLUSTER_CACHE_URL", "http://host")
    assert "CLUSTER_CACHE_URL" in run("stats", exit_code=1)
    monkeypatch.delenv("CLUSTER_CACHE_URL")
    assert "set cluster_cache_url" in run("stats", exit_code=1)
