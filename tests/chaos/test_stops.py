"""Nodes stand still: they die so, or they wake when others have their work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from tests.chaos.harness import FORGIVING, PATIENT, QUICK, Chaos
from tests.process.accounts import END_S
from tests.servers import standing_still
from tests.waiting import wait_until
from workers.redis_server import RedisServer


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param("prefork", marks=pytest.mark.chaos("core")),
        pytest.param("threads", marks=pytest.mark.chaos("short")),
        pytest.param("solo", marks=pytest.mark.chaos("short")),
    ],
)
def test_a_node_that_wakes_after_its_failover_commits_nothing(pool: str, chaos: Chaos) -> None:
    with chaos.nodes(3, pools=(pool,), environ=QUICK | FORGIVING | {"CLUSTER_ON_FENCED": "abandon"}) as nodes:
        nodes.wait_ready()
        with chaos.load(lengths_s=(5.0,), kinds=("plain", "silent"), most_open=10) as load:
            victim = nodes.pick()[0]
            epoch = chaos.checker.epoch_of(victim.id)
            wait_until(lambda: chaos.checker.runs_on(victim.id, load), END_S, "it works")
            # The processes of a pool end their jobs by themselves, and must not do so before the fence.
            children = [child.pid for child in psutil.Process(victim.pid).children() if pool == "prefork"]
            with standing_still(victim.pid, *children):
                chaos.checker.wait_fenced(epoch)
            wait_until(lambda: chaos.checker.stale_commits(), END_S, "what it had at hand is refused and counted")
            chaos.checker.check(load, also_lost=[victim.id])
        # It has joined anew, and works.
        assert chaos.checker.epoch_of(victim.id) != epoch
        assert victim.exit_code() is None


@pytest.mark.chaos("core")
def test_nodes_that_stand_still_and_die_have_lost_nothing_and_a_stock_worker_has(
    chaos: Chaos, redis_server: RedisServer, tmp_path: Path
) -> None:
    with chaos.nodes(4, environ=PATIENT) as nodes:
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
