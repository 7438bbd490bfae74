"""Nodes stand still: they die so, or they wake when others have their work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import FORGIVING, QUICK, Chaos
from tests.chaos.threads import pausing
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until
from workers.redis_server import RedisServer

PAUSE_S = 1.5
"""With a beat a second and a lease of three, a node that is scheduled late can bear so much."""

LATE_S = 0.1


def epoch_of(chaos: Chaos, worker: WorkerProcess) -> str:
    """Its epoch now; nothing between a fence and the next one."""
    beat = chaos.jobs.cluster.epochs.beats().get(worker.id)
    return beat.epoch if beat else ""


def wait_fenced(chaos: Chaos, *epochs: str) -> None:
    wait_until(lambda: all(epoch in chaos.history.fences for epoch in epochs), END_S, "they are fenced")


def stale_commits(chaos: Chaos) -> int:
    found: Any = chaos.jobs.cluster.client.hget(chaos.jobs.cluster.keys.counters, "stale_commits")
    return int(found or 0)


@pytest.mark.chaos("core")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_node_that_wakes_after_its_failover_commits_nothing(pool: str, chaos: Chaos) -> None:
    with chaos.nodes(3, pools=(pool,), environ=QUICK | FORGIVING | {"CLUSTER_ON_FENCED": "abandon"}) as nodes:
        nodes.wait_ready()
        with chaos.load(lengths_s=(5.0,), kinds=("plain", "silent"), most_open=10) as load:
            victim = nodes.pick()[0]
            epoch = epoch_of(chaos, victim)
            wait_until(lambda: chaos.checker.runs_on(victim.id, load), END_S, "it works")
            victim.signal(signal.SIGSTOP)
            wait_fenced(chaos, epoch)
            victim.signal(signal.SIGCONT)
            wait_until(lambda: stale_commits(chaos), END_S, "what it had at hand is refused and counted")
            chaos.checker.check(load, also_lost=[victim.id])
        # It has joined anew, and works.
        assert epoch_of(chaos, victim) != epoch
        assert victim.exit_code() is None


@pytest.mark.chaos("short")
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_node_whose_heartbeat_alone_stops_fences_itself(pool: str, chaos: Chaos) -> None:
    with chaos.nodes(3, pools=(pool,), environ=QUICK | FORGIVING) as nodes:
        nodes.wait_ready()
        with chaos.load(lengths_s=(0.0, 0.05, 2.0)) as load:
            victim = nodes.pick()[0]
            epoch = epoch_of(chaos, victim)
            with pausing(chaos.jobs.app, victim, "cluster-heartbeat"):
                wait_fenced(chaos, epoch)
                wait_until(lambda: len(chaos.history.committed) > 50, END_S, "the others work on")
            wait_until(lambda: epoch_of(chaos, victim) not in ("", epoch), END_S, "it joins anew")
            chaos.checker.check(load, also_lost=[victim.id])
        assert victim.exit_code() is None


@pytest.mark.chaos("short")
@pytest.mark.timeout(900)
def test_pauses_under_saturated_processors_are_no_deaths(chaos: Chaos, by_level: ByLevel) -> None:
    seconds = by_level(short=20, full=600)
    # Every setting is at its default.
    with chaos.nodes(3, pools=("prefork", "threads", "solo")) as nodes:
        nodes.wait_ready()
        kinds = ("plain", "delayed", "burning", "burning", "hogging")
        with chaos.load(kinds=kinds, most_open=30) as load:
            until_s, longer = time.monotonic() + seconds, set()
            while time.monotonic() < until_s:
                worker = nodes.pick()[0]
                if pause(worker) > PAUSE_S + LATE_S:
                    longer.add(worker.id)
                seen = chaos.jobs.cluster.epochs.beats().get(worker.id)
                wait_until(lambda w=worker, s=seen: chaos.jobs.cluster.epochs.beats().get(w.id) != s, END_S, "it beats")
                time.sleep(chaos.rng.uniform(0, 1))  # Beats are not in step with pauses.
            # Where this process was itself so late that a pause was longer, nothing is shown.
            chaos.checker.check(load, also_lost=longer)


def pause(worker: WorkerProcess) -> float:
    """Let a node and all its processes stand still, as a machine does that swaps or moves; return how long it did."""
    family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    began_s = time.monotonic()
    for member in family:
        member.suspend()
    time.sleep(PAUSE_S)  # The fault itself.
    for member in family:
        member.resume()
    return time.monotonic() - began_s


@pytest.mark.chaos("core")
def test_nodes_that_stand_still_and_die_have_lost_nothing_and_a_stock_worker_has(
    chaos: Chaos, redis_server: RedisServer, tmp_path: Path
) -> None:
    with chaos.nodes(4, environ=QUICK) as nodes:
        nodes.wait_ready()
        load = chaos.load()
        for victim in nodes.pick(3):
            victim.signal(signal.SIGSTOP)
            for number in range(8):
                load.accept(chaos.jobs.work.delay(0.05, key=str(number)))
            nodes.kill(victim)
        chaos.checker.check(load, nodes.kills)

    # The same attack on the transport of Kombu, to see that it would show.
    url = f"redis://127.0.0.1:{redis_server.port}/1"
    code = ["from celery import Celery", f"app = Celery('stock', broker={url!r}, backend={url!r})"]
    (tmp_path / "stock.py").write_text("\n".join([*code, "@app.task", "def one(): return 1"]))
    with Celery("stock", broker=url, set_as_current=False) as stock:
        stock.conf.broker_transport_options = {"visibility_timeout": 5}
        lost = sum(_is_lost_by_a_stock_worker(stock, url, tmp_path, number) for number in range(3))
    print(f"the stock transport lost {lost} of 3 jobs")
    assert lost


def _is_lost_by_a_stock_worker(stock: Celery, url: str, directory: Path, number: int) -> bool:
    words = ["-m", "celery", "-A", "stock", "worker", "-c", "1", "-n", f"s{number}@test", "-l", "INFO"]
    log = directory / f"stock{number}.log"
    environ = {**os.environ, "PYTHONPATH": str(directory)}
    with log.open("wb") as output:
        worker = subprocess.Popen([sys.executable, *words], env=environ, cwd=directory, stdout=output, stderr=output)
    with redis.Redis.from_url(url) as client:

        def is_done(job: Any) -> bool:
            return bool(client.exists(f"celery-task-meta-{job.id}"))

        try:
            wait_until(lambda: " ready." in log.read_text(), END_S, "the stock worker starts")
            # Connections stand before the worker does: what it last asked for is answered within a second.
            first = stock.send_task("stock.one")
            wait_until(lambda: is_done(first), END_S, "the stock worker works")
            worker.send_signal(signal.SIGSTOP)
            job = stock.send_task("stock.one")
        finally:
            worker.kill()
            worker.wait()
        return not (is_done(job) or client.hlen("unacked") or client.llen("celery"))
