"""A node that stands still and dies, beside a worker on the transport of Kombu."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.kills.loop import QUICK
from tests.process.nodes import running
from tests.waiting import wait_until
from workers.redis_server import RedisServer


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
