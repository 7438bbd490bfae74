"""Nodes of one pool that die at random instants under load."""

from __future__ import annotations

import random
import signal
import threading
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


def kill_at_random_instants(pool: str, jobs: Jobs, new_worker: NewWorker, rng: random.Random) -> None:
    """Kill nodes of a pool under load, and hold the accounts against the promises."""
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
