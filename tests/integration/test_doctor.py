"""``cluster doctor`` as a user meets it: a real Redis, well set and badly, real workers, and what they left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner

from cluster_tasks import Node
from cluster_tasks.broker.placement import Crash
from cluster_tasks.cli.cluster import cluster as group
from cluster_tasks.redis_store import connect
from tests.broker import make_message
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until
from workers.redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]
END_S = 240.0
LEVELS = ("ok", "warn", "bad")
BUSY = {"redis.round_trip", "redis.fork", "registry.reach"}
"""What a busy machine makes slow."""
Findings = dict[str, list[dict[str, str]]]


def look(**environ: str) -> tuple[int, Findings]:
    """Return the exit code and the findings by check, of the command run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        app = make_jobs().app
        try:
            done = CliRunner().invoke(
                group, ["doctor", "--json"], obj=CLIContext(app, no_color=False, workdir=None), catch_exceptions=False
            )
        finally:
            app.close()
    assert not done.stderr, done.stderr
    told = json.loads(done.stdout)
    by_check: Findings = {}
    for finding in told["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    levels = [finding["level"] for finding in told["findings"]]
    assert told["level"] == max(levels, key=LEVELS.index)
    assert done.exit_code == LEVELS.index(told["level"])
    return done.exit_code, by_check


def levels(found: Findings) -> dict[str, str]:
    return {check: finding["level"] for check, (finding, *_) in found.items() if finding["level"] != "ok"}


@pytest.fixture
def well_set(redis_binary: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis as docs/operations.md wants it."""
    with RedisServer(tmp_path / "redis", appendonly=True, extra=["maxmemory 200mb"]) as server:
        yield server


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test, on the Redis of this module; the commands of the test find it, too."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_jobs()
    yield made
    made.app.close()


@pytest.fixture
def new_worker(redis_server: RedisServer, tmp_path: Path) -> Callable[..., WorkerProcess]:
    """Make workers of the app under test, not started yet."""
    return lambda name: WorkerProcess(name, redis_server.url, tmp_path, pool="threads")


def join(jobs: Jobs, name: str) -> Node:
    """Let a node join that shows no further sign of life."""
    node = Node(id=f"{name}@host", name=name, serves=frozenset({"llm"}))
    epoch = jobs.cluster.epochs.open(node.id, node.serves)
    assert isinstance(epoch, str)
    joined = node.model_copy(update={"epoch": epoch, "last_seen": jobs.cluster.clock.time()})
    jobs.cluster.registry.register(joined)
    return joined


def test_a_cluster_that_is_well_is_told_so(well_set: RedisServer, tmp_path: Path) -> None:
    environ = {"CLUSTER_BROKER_URL": well_set.url}
    worker = WorkerProcess("a", well_set.url, tmp_path, pool="threads")
    coordinator = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "coordinator", "-n", "c@test"]
    with (
        running(worker),
        subprocess.Popen(coordinator, env={**os.environ, **environ}, cwd=ROOT, stderr=subprocess.DEVNULL) as chief,
        connect(well_set.url) as client,
    ):
        try:
            wait_until(lambda: int(client.get("cluster:checks") or 0) > 2, END_S, "it checks")
            code, found = look(**environ)
            assert levels(found).keys() <= BUSY, found
            assert code == 0 or levels(found)
            assert found["coordinator"][0]["found"] == "c@test"
            assert {"redis.persistence", "jobs.orphans", "clock.nodes", "nodes.beats", "locks.held"} <= found.keys()
        finally:
            chief.send_signal(signal.SIGTERM)
            chief.wait(END_S)


def test_each_bad_setting_of_redis_is_told(redis_binary: str, tmp_path: Path) -> None:
    extra = [
        "maxmemory 100mb", "maxmemory-policy allkeys-lru", "timeout 30", "maxclients 20",
        "client-output-buffer-limit pubsub 1mb 0 0", "client-output-buffer-limit normal 1mb 0 0",
        "min-replicas-to-write 1", "slowlog-log-slower-than 100000",
    ]  # fmt: skip
    with RedisServer(tmp_path / "redis", extra=extra) as server:
        with connect(server.url, socket_timeout=END_S) as client:
            client.eval("for i = 1, 1e8 do end", 0)
            others = [connect(server.url) for _ in range(15)]
            for other in others:
                other.ping()
        code, found = look(CLUSTER_BROKER_URL=server.url)
        for other in others:
            other.close()
        assert code == 2
        told = levels(found)
    assert told.items() >= {
        "redis.eviction": "bad", "redis.persistence": "bad", "redis.timeout": "warn", "redis.connections": "warn",
        "redis.buffers": "warn", "redis.replicas": "bad", "redis.slow": "warn", "jobs.served": "bad",
        "coordinator": "warn",
    }.items(), told  # fmt: skip
    assert len(found["redis.buffers"]) == 2
    assert "EVAL" in found["redis.slow"][0]["found"]


def test_the_advice_for_redis_is_good(redis_binary: str, tmp_path: Path) -> None:
    """What CONFIG SET is said to do away with is not told again."""
    extra = [
        "maxmemory 100mb", "maxmemory-policy allkeys-lru", "timeout 30", "client-output-buffer-limit pubsub 1mb 0 0",
        "client-output-buffer-limit normal 1mb 0 0",
    ]  # fmt: skip
    with RedisServer(tmp_path / "redis", extra=extra) as server:
        _, found = look(CLUSTER_BROKER_URL=server.url)
        remedies = [finding["remedy"] for check in found.values() for finding in check if finding["level"] != "ok"]
        settings = [remedy.removeprefix("CONFIG SET ") for remedy in remedies if remedy.startswith("CONFIG SET ")]
        assert len(settings) == 5
        with connect(server.url) as client:
            for setting in settings:
                name, value = setting.split(",")[0].split(";")[0].split(" ", 1)
                client.config_set(name, value.strip("'"))
        _, found = look(CLUSTER_BROKER_URL=server.url)
        assert {check for check in levels(found) if check.startswith("redis.")} <= BUSY


def test_it_needs_no_more_than_to_read_and_writes_nothing(jobs: Jobs, redis_server: RedisServer) -> None:
    join(jobs, "a")
    jobs.work.delay()
    jobs.work.apply_async(countdown=3600)
    with connect(redis_server.url) as client:
        client.execute_command(
            "ACL",
            "SETUSER",
            "doctor",
            "on",
            ">look",
            "~*",
            "+@read",
            "+@connection",
            "+info",
            "+time",
            "+multi",
            "+exec",
        )
        before = contents(client)
        code, found = look(CLUSTER_BROKER_URL=redis_server.url.replace("//", "//doctor:look@"))
        assert contents(client) == before
        client.execute_command("ACL", "DELUSER", "doctor")
    assert code == 2
    assert "no permissions" in found["redis.config"][0]["found"]
    assert found["nodes.beats"][0]["level"] == "bad"
    assert found["redis.reach"][0]["found"].startswith("redis://doctor:**@"), "no password is shown"


def contents(client: Any) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.scan_iter()}


def test_a_redis_that_is_away_is_a_finding(redis_binary: str) -> None:
    port = free_port()
    code, found = look(CLUSTER_BROKER_URL=f"redis://:hidden@127.0.0.1:{port}/0")
    assert code == 2
    assert levels(found) == {"redis.reach": "bad"}
    assert f"127.0.0.1:{port}" in found["redis.reach"][0]["found"]
    assert "hidden" not in str(found)


def test_a_registry_and_a_cache_that_are_away_are_findings(jobs: Jobs) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    code, found = look(CLUSTER_REGISTRY_URL=away, CLUSTER_CACHE_URL=away)
    assert code == 2
    assert {"registry.reach", "cache.reach", "locks.held"} <= levels(found).keys()
    assert "coordinator" not in found, "nobody can know"


def test_a_wrong_setting_is_a_finding() -> None:
    code, found = look(CLUSTER_LEASE_S="soon")
    assert (code, levels(found)) == (2, {"settings": "bad"})
    assert "CLUSTER_LEASE_S='soon'" in found["settings"][0]["found"]


def test_an_app_that_cannot_be_loaded_is_told_in_one_line() -> None:
    words = [sys.executable, "-m", "cluster_tasks.cli.main", "doctor", "--app", "no_such_app"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=END_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: there is no Celery app 'no_such_app'")
    assert "--app" in done.stderr


def test_celery_has_the_command_too_and_a_pipe_gets_every_word(jobs: Jobs) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "doctor"], cwd=ROOT,
        capture_output=True, text=True, timeout=END_S, check=False,
    )  # fmt: skip
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["level", "check", "found", "means", "remedy"]
    assert {len(row) for row in rows} == {5}
    assert done.returncode == 2


# What is left of nodes


def make_orphans(jobs: Jobs) -> tuple[Any, Any]:
    """Leave two jobs behind that no table names, in what two epochs held."""
    first, second = join(jobs, "a"), join(jobs, "b")
    client, keys = jobs.cluster.client, jobs.cluster.keys
    client.hset(keys.unacked(first.id, first.epoch), "1.1.1", make_message("held", "llm"))
    client.hset(keys.unacked(second.id, second.epoch), "1.1.1", make_message("put-away", "llm"))
    assert jobs.cluster.epochs.fence(second.id, jobs.cluster.epochs.beats()[second.id])
    for node in (first, second):
        client.hdel(keys.epochs, keys.node_queue(node.id))
        client.srem(keys.opened, f"{node.id}/{node.epoch}")
    client.delete(keys.fenced)
    return first, second


def test_jobs_that_no_table_names_are_found_and_the_advice_brings_them_back(
    jobs: Jobs, new_worker: Callable[..., WorkerProcess], redis_server: RedisServer
) -> None:
    make_orphans(jobs)
    code, found = look()
    assert code == 2
    orphans = [finding for finding in found["jobs.orphans"] if finding["level"] == "bad"]
    assert len(orphans) == 2
    with running(new_worker("c")):
        for finding in orphans:
            command = finding["remedy"].partition(": ")[0].removeprefix("redis-cli ")
            words = command[: command.rindex("'") + 1].replace("'", "\0").split("\0")
            with connect(redis_server.url) as client:
                client.execute_command(*words[0].split(), *[word for word in words[1:] if word.strip()])
        keys = jobs.cluster.keys

        def gone() -> bool:
            kept = [f"{keys.name}:remains*", f"{keys.unacked_prefix}[ab]@*"]
            return not any(list(jobs.cluster.client.scan_iter(pattern)) for pattern in kept)

        wait_until(gone, END_S, "the jobs are moved")
    assert look()[1]["jobs.orphans"][0]["level"] == "ok"


def test_a_fence_that_nobody_finished_is_told_while_nobody_lives(jobs: Jobs) -> None:
    node = join(jobs, "a")
    jobs.cluster.client.hset(jobs.cluster.keys.unacked(node.id, node.epoch), "1.1.1", make_message("held", "llm"))
    assert jobs.cluster.epochs.fence(node.id, jobs.cluster.epochs.beats()[node.id])
    (finding,) = look()[1]["jobs.orphans"]
    assert finding["level"] == "bad"
    assert f"1 jobs of epochs that have ended: {node.id}/{node.epoch}" in finding["found"]


def test_a_list_that_somebody_else_has_filled_is_told_and_the_advice_counts_it(jobs: Jobs) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    client.lpush(keys.waiting_queue("llm"), make_message("stray", "llm"))
    client.zadd(keys.backlog, {"node.gone@host": 2})
    found = {finding["found"]: finding for finding in look()[1]["jobs.index"]}
    assert set(found) == {
        "waiting.llm has 1 jobs, and the index of lists says 0",
        "node.gone@host has 0 jobs, and the index of lists says 2",
    }  # fmt: skip
    for finding in found.values():
        command = finding["remedy"].removeprefix("redis-cli ").partition(",")[0]
        client.execute_command(*command.replace("'", "").split())
    assert "jobs.index" not in look()[1]
    assert jobs.cluster.epochs.lengths() == {"waiting.llm": 1}


def test_what_was_set_aside_and_what_is_late_is_told(jobs: Jobs) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    client.rpush(keys.undecodable, "what?")
    jobs.cluster.quarantine.put("bad", "jobs.work", make_message("bad", "llm"), [Crash("a@x", "1-x", "killed", 1.0)])
    jobs.work.apply_async(countdown=0.1)
    client.zadd(keys.delayed, dict.fromkeys(client.zrange(keys.delayed, 0, -1), 1.0))
    held = jobs.cluster.locks.acquire("shard/docs/0", ttl_s=300)
    client.set(keys.lock("forever"), "1")
    code, found = look()
    told = levels(found)
    held.release()
    assert code == 2
    assert told.items() >= {
        "jobs.undecodable": "warn", "jobs.quarantine": "warn", "jobs.delayed": "bad", "locks.held": "bad"
    }.items(), told  # fmt: skip
    assert "forever" in found["locks.held"][0]["found"]
    client.delete(keys.lock("forever"))
    assert found["jobs.delayed"][0]["found"] == "1 of 1 delayed jobs should have begun"


def test_a_node_whose_clock_is_wrong_is_told(jobs: Jobs) -> None:
    node = join(jobs, "a")
    late = node.model_copy(update={"last_seen": jobs.cluster.clock.time() - 500})
    jobs.cluster.registry.register(late)
    stopping = threading.Event()

    def beat() -> None:
        while not stopping.wait(0.1):
            jobs.cluster.epochs.beat(node.id, node.epoch)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        (finding,) = look()[1]["clock.nodes"]
    finally:
        stopping.set()
        beating.join()
    assert finding["level"] == "bad"
    assert finding["found"].startswith("a@host -5")
