"""Nodes of one pool that die at random instants under load."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

from tests.process.accounts import END_S, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import WorkerProcess, running
from tests.process.traffic import Traffic
from tests.waiting import wait_until

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


class Mixed(Traffic):
    """Jobs of all kinds."""

    def __init__(self, jobs: Jobs, seed: int) -> None:
        super().__init__(pause_s=0.02)
        self._jobs, self._rng = jobs, random.Random(seed)
        self.silent: list[str] = []

    def send(self, number: int) -> None:
        jobs, rng = self._jobs, self._rng
        kinds: list[Callable[[], Any]] = [
            lambda: jobs.work.delay(rng.choice((0.0, 0.0, 0.05, 0.3)), key=str(rng.randrange(5))),
            lambda: jobs.work.apply_async((0.02,), priority=rng.randrange(10)),
            lambda: jobs.work.apply_async((0.02,), countdown=rng.uniform(0, 2)),
            lambda: jobs.flaky.delay(2),
            lambda: (jobs.work.si(0.02) | jobs.work.si(0.02)).apply_async(),
        ]
        if rng.random() < 0.15:
            self.silent.append(jobs.silent.delay(0.02).id)
        else:
            self.results.append(rng.choice(kinds)())


def settle(jobs: Jobs, traffic: Mixed) -> None:
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


def kill_at_random_instants(pool: str, jobs: Jobs, new_worker: NewWorker, rng: random.Random) -> None:
    """Kill nodes of a pool under load, and hold the accounts against the promises."""
    numbers = count(1)

    def node() -> WorkerProcess:
        return new_worker(f"n{next(numbers)}", pool=pool, app="tests.process.audited", environ=QUICK)

    alive = [node() for _ in range(NODES)]
    with ExitStack() as stack:
        stack.enter_context(running(*alive))
        with Mixed(jobs, rng.randrange(10**9)) as traffic:
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
