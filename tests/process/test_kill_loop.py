"""Nodes die at random instants under load, connections and replies are cut: no job is lost, none is committed twice.

A run prints its seed; ``KILL_LOOP_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import TimeoutError as StillWaiting

from tests.process.accounts import END_S, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import WorkerProcess, running
from tests.process.proxy import wire_to
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KILLS = 20
"""For each pool."""
NODES = 4
QUICK = {
    "CLUSTER_HEARTBEAT_S": "0.3",
    "CLUSTER_LEASE_S": "1.2",
    "CLUSTER_HEALTH_CHECK_S": "0.25",
    # Whoever is killed so often takes jobs along that did nothing: here all must succeed.
    "CLUSTER_MAX_CRASH_DELIVERIES": "1000",
}


@pytest.fixture
def rng() -> random.Random:
    seed = os.environ.get("KILL_LOOP_SEED") or str(random.SystemRandom().randrange(10**9))
    print(f"KILL_LOOP_SEED={seed}")
    return random.Random(seed)


class Traffic:
    """Jobs of all kinds, sent by a thread of its own until it is stopped."""

    def __init__(self, jobs: Jobs, seed: int, pause_s: float = 0.02) -> None:
        self._jobs, self._rng, self._pause_s = jobs, random.Random(seed), pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.results: list[Any] = []
        self.silent: list[str] = []

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _send(self) -> None:
        jobs, rng = self._jobs, self._rng
        kinds: list[Callable[[], Any]] = [
            lambda: jobs.work.delay(rng.choice((0.0, 0.0, 0.05, 0.3)), key=str(rng.randrange(5))),
            lambda: jobs.work.apply_async((0.02,), priority=rng.randrange(10)),
            lambda: jobs.work.apply_async((0.02,), countdown=rng.uniform(0, 2)),
            lambda: jobs.flaky.delay(2),
            lambda: (jobs.work.si(0.02) | jobs.work.si(0.02)).apply_async(),
        ]
        while not self._stopping.wait(self._pause_s):
            if rng.random() < 0.15:
                self.silent.append(jobs.silent.delay(0.02).id)
            else:
                self.results.append(rng.choice(kinds)())


def settle(jobs: Jobs, traffic: Traffic) -> None:
    """Wait for the end of every job, and hold the accounts against the promises."""
    client = jobs.cluster.client
    for result in traffic.results:
        result.get(timeout=END_S)
    wait_until_nothing_is_left(jobs)
    ran = [client.llen(f"test:started:{job_id}") for job_id in traffic.silent]
    assert all(ran), "jobs without results were lost"
    ends = Counter(client.lrange("test:succeeded", 0, -1))
    assert not client.lrange("test:failed", 0, -1)
    assert [job_id for job_id, times in ends.items() if times > 1] == [], "committed twice"
    assert not jobs.cluster.quarantine.jobs()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_kills_at_random_instants_lose_and_double_nothing(
    pool: str, jobs: Jobs, new_worker: NewWorker, rng: random.Random
) -> None:
    numbers = count(1)

    def node() -> WorkerProcess:
        return new_worker(f"n{next(numbers)}", pool=pool, app="tests.process.audited", environ=QUICK)

    alive = [node() for _ in range(NODES)]
    with ExitStack() as stack:
        stack.enter_context(running(*alive))
        with Traffic(jobs, rng.randrange(10**9)) as traffic:
            for _ in range(KILLS):
                wait_until(lambda: sum(worker.is_ready() for worker in alive) >= 2, END_S, "two nodes work")
                time.sleep(rng.uniform(0, 0.6))  # A random instant is what this is about.
                victim = rng.choice([worker for worker in alive if worker.is_ready()])
                alive.remove(victim)
                if rng.random() < 0.3:
                    # It may be idle: whoever popped jobs for it would lose them now.
                    victim.signal(signal.SIGSTOP)
                    time.sleep(rng.uniform(0, 0.2))
                victim.kill()
                new = node()
                stack.callback(new.stop)
                alive.append(new.start())
        settle(jobs, traffic)
    lost = [event for event in jobs.cluster.events.latest(1000) if event.kind == "node lost"]
    assert len({event.facts["node"] for event in lost}) >= KILLS


@pytest.mark.timeout(300)
def test_cut_connections_and_lost_replies_lose_and_double_nothing(
    jobs: Jobs, new_worker: NewWorker, redis_server: RedisServer, tmp_path: Path, rng: random.Random
) -> None:
    with wire_to(redis_server.port) as wire:
        environ = {**QUICK, "CLUSTER_LEASE_S": "5", "TEST_NOTES_URL": redis_server.url}
        workers = [
            WorkerProcess(pool, wire.url, tmp_path, app="tests.process.audited", pool=pool, environ=environ)
            for pool in ("prefork", "threads", "solo")
        ]
        with running(*workers), Traffic(jobs, rng.randrange(10**9)) as traffic:
            for _ in range(60):
                time.sleep(rng.uniform(0, 0.3))
                if rng.random() < 0.5:
                    wire.cut_replies(rng.randrange(1, 4))
                else:
                    own = jobs.cluster.client.client_id()
                    others = [entry["id"] for entry in jobs.cluster.client.client_list() if int(entry["id"]) != own]
                    jobs.cluster.client.client_kill_filter(_id=rng.choice(others))
            assert wire.cut > 10
            traffic.__exit__()
            settle(jobs, traffic)
            assert [worker.exit_code() for worker in workers] == [None] * 3


def test_a_node_that_stands_still_and_dies_has_lost_nothing_and_a_stock_worker_has(
    jobs: Jobs, new_worker: NewWorker, redis_server: RedisServer, tmp_path: Path
) -> None:
    doomed = [new_worker(f"idle{number}", environ=QUICK) for number in range(3)]
    with running(new_worker("alive", environ=QUICK), *doomed):
        results = []
        for worker in doomed:
            worker.signal(signal.SIGSTOP)
            results += [jobs.work.delay(0.05, key=str(number)) for number in range(8)]
            worker.kill()
        assert all(result.get(timeout=END_S) for result in results)

    # The same attack on the transport of Kombu, to see that it would show.
    url = f"redis://127.0.0.1:{redis_server.port}/1"
    code = ["from celery import Celery", f"app = Celery('stock', broker={url!r}, backend={url!r})"]
    (tmp_path / "stock.py").write_text("\n".join([*code, "@app.task", "def one(): return 1"]))
    with Celery("stock", broker=url, backend=url, set_as_current=False) as stock:
        stock.conf.broker_transport_options = {"visibility_timeout": 5}
        lost = sum(_is_lost_by_a_stock_worker(stock, url, tmp_path, number) for number in range(3))
        stock.backend.result_consumer.stop()
        stock.backend.client.close()
    print(f"the stock transport lost {lost} of 3 jobs")
    assert lost


def _is_lost_by_a_stock_worker(stock: Celery, url: str, directory: Path, number: int) -> bool:
    words = ["-m", "celery", "-A", "stock", "worker", "-c", "1", "-n", f"s{number}@test", "-l", "INFO"]
    log = directory / f"stock{number}.log"
    environ = {**os.environ, "PYTHONPATH": str(directory)}
    with log.open("wb") as output:
        worker = subprocess.Popen([sys.executable, *words], env=environ, cwd=directory, stdout=output, stderr=output)
    try:
        wait_until(lambda: " ready." in log.read_text(), END_S, "the stock worker starts")
        # Connections stand before the worker does: what it last asked for is answered within a second.
        assert stock.send_task("stock.one").get(timeout=END_S) == 1
        worker.send_signal(signal.SIGSTOP)
        result = stock.send_task("stock.one")
    finally:
        worker.kill()
        worker.wait()
    with redis.Redis.from_url(url) as client:
        kept = client.hlen("unacked") + client.llen("celery")
    try:
        result.get(timeout=0.1)
    except StillWaiting:
        return not kept
    return False
