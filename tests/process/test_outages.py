"""Redis refuses, forgets, restarts or falls silent: no worker ends, no job is lost, none runs twice."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chord, states
from kombu.exceptions import OperationalError

from cluster_tasks.errors import NodeLost
from cluster_tasks.redis_store import connect
from tests.process.accounts import END_S, let_go, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.process.proxy import wire_to
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer, free_port

Fault = Callable[[Jobs, RedisServer], AbstractContextManager[None]]
Alone = Callable[[str], AbstractContextManager[tuple[Jobs, WorkerProcess, redis.Redis]]]
LASTS_S = 3.0
SILENT_S = 10.0
"""Longer than a node waits for replies before it goes on without them."""


@contextmanager
def refusing_writes_for_lack_of_memory(jobs: Jobs, server: RedisServer) -> Iterator[None]:
    jobs.cluster.client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        jobs.cluster.client.config_set("maxmemory", "0")


@contextmanager
def a_replica_of_another(jobs: Jobs, server: RedisServer) -> Iterator[None]:
    jobs.cluster.client.replicaof("127.0.0.1", free_port())
    try:
        yield
    finally:
        jobs.cluster.client.replicaof("NO", "ONE")


@contextmanager
def forgetting_its_scripts(jobs: Jobs, server: RedisServer) -> Iterator[None]:
    jobs.cluster.client.script_flush()
    try:
        yield
    finally:
        jobs.cluster.client.script_flush()


@contextmanager
def restarted(jobs: Jobs, server: RedisServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def unable_to_save_itself(jobs: Jobs, server: RedisServer) -> Iterator[None]:
    client = jobs.cluster.client
    in_the_way = server.directory / client.config_get("dbfilename")["dbfilename"]
    in_the_way.mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", END_S, "it cannot save")
    try:
        yield
    finally:
        client.config_set("save", "")
        in_the_way.rmdir()


FAULTS = [
    unable_to_save_itself,
    refusing_writes_for_lack_of_memory,
    a_replica_of_another,
    forgetting_its_scripts,
    restarted,
]


@pytest.fixture
def lasting_redis(redis_binary: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that keeps what it was told over a restart."""
    with redis_for_results(tmp_path / "redis", appendonly=True) as server:
        yield server


@pytest.fixture
def alone(
    lasting_redis: RedisServer, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Alone:
    """Runs one worker of an app on a Redis that will have a fault; what tasks note is in another one."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", lasting_redis.url)

    @contextmanager
    def run(app: str) -> Iterator[tuple[Jobs, WorkerProcess, redis.Redis]]:
        jobs, environ = make_jobs(), {"TEST_NOTES_URL": redis_server.url}
        worker = WorkerProcess("a", lasting_redis.url, tmp_path, app=app, pool="threads", environ=environ)
        with running(worker), connect(redis_server.url) as notes:
            yield jobs, worker, notes
            wait_until_nothing_is_left(jobs)
        jobs.app.close()

    return run


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", FAULTS)
def test_nodes_outlast_a_redis_that_is(
    fault: Fault, lasting_redis: RedisServer, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", lasting_redis.url)
    jobs, environ = make_jobs(), {"TEST_NOTES_URL": redis_server.url}
    workers = [
        WorkerProcess(pool, lasting_redis.url, tmp_path, pool=pool, environ=environ)
        for pool in ("prefork", "threads", "solo")
    ]
    with running(*workers):
        results = [jobs.work.delay(0.5, key=str(number)) for number in range(20)]
        with fault(jobs, lasting_redis):
            threading.Event().wait(LASTS_S)  # The length of the fault, not a wait for something.
        results += [jobs.work.delay(0.05, key=str(number)) for number in range(20)]
        assert all(result.get(timeout=END_S) for result in results)
        assert [worker.exit_code() for worker in workers] == [None] * 3
        wait_until_nothing_is_left(jobs)
        with connect(redis_server.url) as notes:
            assert {notes.llen(f"test:started:{result.id}") for result in results} == {1}
        assert "node lost" not in [event.kind for event in jobs.cluster.events.latest(1000)]
    del results
    jobs.app.close()


def test_what_must_not_run_twice_fails_if_its_end_cannot_be_stored(alone: Alone, lasting_redis: RedisServer) -> None:
    with alone("tests.process.impatient") as (jobs, worker, notes):
        once = jobs.stubborn_once.delay(LASTS_S)
        once_id = once.id
        wait_until(lambda: notes.llen(f"test:started:{once_id}"), END_S, "it runs")
        with refusing_writes_for_lack_of_memory(jobs, lasting_redis):
            told = rf"the end of job jobs\.stubborn_once\[{once_id}\] is not stored"
            wait_until(lambda: re.search(told, worker.read_log()), END_S, "it has run in vain")
        with pytest.raises(NodeLost, match="its end could not be stored"):
            once.get(timeout=END_S)
        assert notes.llen(f"test:started:{once_id}") == 1
        del once


@pytest.mark.parametrize("fault", [refusing_writes_for_lack_of_memory, restarted])
def test_a_job_whose_next_step_cannot_be_published_does_not_fail_for_it(
    fault: Fault, alone: Alone, lasting_redis: RedisServer
) -> None:
    with alone("tests.process.impatient") as (jobs, worker, notes):
        last = (jobs.patient.si() | jobs.work.si()).apply_async()
        first: Any = last.parent
        first_id = first.id
        wait_until(lambda: notes.llen(f"test:started:{first_id}"), END_S, "it runs")
        with fault(jobs, lasting_redis):
            let_go(notes, first)
            # Then it is let lie at once. Were it to fail, that would be stored as soon as Redis is back.
            told = rf"the end of job jobs\.patient\[{first_id}\] is not stored|Connection to Redis lost: Retry"
            wait_until(lambda: re.search(told, worker.read_log()), END_S, "it cannot be published")
        assert [last.get(timeout=END_S), first.get(timeout=END_S)] == [worker.id] * 2
        del first, last


def test_a_chord_whose_failure_redis_refuses_to_store_fails_when_it_can(alone: Alone) -> None:
    with alone("tests.process.refused") as (jobs, _, notes):
        body = jobs.work.si().on_error(jobs.app.signature("jobs.refuse"))
        failed = chord([jobs.verbose.si(5, 0.0)], body)()
        wait_until(lambda failed=failed: failed.state == states.FAILURE, END_S, "it fails")
        assert notes.llen("test:refused") > 1, "it was refused"
        del failed


def test_a_producer_is_told_why_redis_refuses_a_job(jobs: Jobs, redis_server: RedisServer) -> None:
    why = pytest.raises(OperationalError, match=r"Redis refused a command: .*command not allowed when used memory")
    with refusing_writes_for_lack_of_memory(jobs, redis_server), why:
        jobs.work.apply_async(retry_policy={"max_retries": 1})
    assert jobs.cluster.epochs.lengths() == {}


def test_a_connection_that_has_fallen_silent_is_replaced(
    jobs: Jobs, new_worker: NewWorker, redis_server: RedisServer, tmp_path: Path
) -> None:
    with wire_to(redis_server.port) as wire:
        environ = {"TEST_NOTES_URL": redis_server.url}
        workers = [
            WorkerProcess(pool, wire.url, tmp_path, pool=pool, environ=environ)
            for pool in ("prefork", "threads", "solo")
        ]
        with running(*workers):
            assert jobs.work.delay().get(timeout=END_S)
            wire.freeze()
            threading.Event().wait(0.5)
            wire.thaw()
            results = [jobs.work.delay(0.3) for _ in range(12)]
            assert all(result.get(timeout=END_S) for result in results)
            wait_until(lambda: len(jobs.cluster.epochs.beats()) == 3, END_S, "all beat again")
            assert [worker.exit_code() for worker in workers] == [None] * 3
            wait_until_nothing_is_left(jobs)


def test_a_node_waits_for_a_redis_that_is_not_there_yet(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    monkeypatch.setenv("CLUSTER_BROKER_URL", url)
    worker = WorkerProcess("early", url, tmp_path).start()
    try:
        wait_until(lambda: "cannot join yet" in worker.read_log(), END_S, "it says that it waits")
        with redis_for_results(tmp_path / "redis", port=port):
            worker.wait_ready()
            jobs = make_jobs()
            assert jobs.work.delay().get(timeout=END_S) == worker.id
            assert worker.stop() == 0
            jobs.app.close()
    finally:
        worker.stop()


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_job_whose_turn_comes_while_redis_is_silent_is_not_started_when_the_lease_may_have_run_out(
    pool: str, lasting_redis: RedisServer, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", lasting_redis.url)
    jobs, environ = make_jobs(), {"TEST_NOTES_URL": redis_server.url}
    with wire_to(lasting_redis.port) as wire, connect(redis_server.url) as notes:
        # Celery's own heartbeat would wait for Redis first.
        options = ("--without-heartbeat",)
        worker = WorkerProcess("a", wire.url, tmp_path, pool=pool, environ=environ, options=options)
        with running(worker):
            wait_until(lambda: jobs.app.control.rate_limit("jobs.limited", "1/s", reply=True), END_S)

            def started(ids: list[str]) -> int:
                return sum(notes.llen(f"test:started:{job_id}") for job_id in ids)

            def is_silent_before_the_turn_of_one() -> list[str]:
                ids = [jobs.limited.delay().id for _ in range(2)]
                wait_until(lambda: started(ids) == 2 or (started(ids) == 1 and holds_one_back(jobs)), END_S)
                wire.hold(requests=True, replies=True)
                # It comes in a second, and this process may be late.
                if started(ids) == 1 and holds_one_back(jobs):
                    return ids
                wire.hold(requests=False, replies=False)
                wait_until(lambda: started(ids) == 2, END_S)
                return []

            # To say that its turn has come takes Redis, and then a node waits longer than a lease lasts.
            ids = wait_until(is_silent_before_the_turn_of_one, END_S, "Redis is silent in time")
            threading.Event().wait(SILENT_S)
            assert started(ids) == 1
            wire.hold(requests=False, replies=False)
            assert [jobs.app.AsyncResult(job_id).get(timeout=END_S) for job_id in ids] == [worker.id] * 2
            assert started(ids) == 2
            wait_until_nothing_is_left(jobs)
    jobs.app.close()


def holds_one_back(jobs: Jobs) -> bool:
    """Whether nodes hold one job in all, and it is noted that they have not begun with it."""
    client, keys = jobs.cluster.client, jobs.cluster.keys
    held = sum(client.hlen(key) for key in client.scan_iter(f"{keys.name}:unacked:*", count=1000))
    return held == 1 and any(client.scan_iter(f"{keys.name}:not_started*", count=1000))
