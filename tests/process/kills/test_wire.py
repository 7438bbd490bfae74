"""Connections and replies are cut under load."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.kills.loop import QUICK, Mixed, settle
from tests.process.nodes import WorkerProcess, running
from tests.process.proxy import wire_to
from workers.redis_server import RedisServer


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
        with running(*workers), Mixed(jobs, rng.randrange(10**9)) as traffic:
            for _ in range(60):
                time.sleep(rng.uniform(0, 0.3))
                if rng.random() < 0.5:
                    wire.cut_replies(rng.randrange(1, 4))
                else:
                    own = jobs.cluster.client.client_id()
                    others = [entry["id"] for entry in jobs.cluster.client.client_list() if int(entry["id"]) != own]
                    jobs.cluster.client.client_kill_filter(_id=rng.choice(others))
            assert wire.cut > 10
            traffic.stop()
            settle(jobs, traffic)
            assert [worker.exit_code() for worker in workers] == [None] * 3
