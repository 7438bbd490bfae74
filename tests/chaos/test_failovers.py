"""Redis itself fails over under load. What the replica had not heard is lost; all that survived keeps the promises."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.chaos.harness import POOLS, Chaos, chaos_on
from tests.chaos.load import Load
from tests.chaos.sentinels import Replicated, replicated
from tests.process.accounts import END_S
from tests.waiting import wait_until
from workers.redis_server import RedisServer

Fault = Callable[[Replicated], None]
LOST_S = 1.0
"""What was sent so long before the fault may be lost with it."""


def killed(servers: Replicated) -> None:
    time.sleep(LOST_S)
    servers.first.kill()


def rolled_back(servers: Replicated) -> None:
    servers.stop_replicating()
    time.sleep(LOST_S)
    servers.first.kill()


def frozen(servers: Replicated) -> None:
    time.sleep(LOST_S)
    psutil.Process(servers.first.pid).suspend()


def bring_back(servers: Replicated) -> None:
    if servers.first.running:
        psutil.Process(servers.first.pid).resume()
    servers.first.start()


@pytest.mark.chaos("short")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", [killed, rolled_back, frozen])
def test_after_a_failover_of_redis_all_that_survived_keeps_the_promises(
    fault: Fault, redis_server: RedisServer, tmp_path: Path, rng: random.Random
) -> None:
    # A master that cannot reach its replica takes no writes: else one that was frozen takes some when it wakes.
    safe = ("min-replicas-to-write 1", "min-replicas-max-lag 5") if fault is frozen else ()
    with replicated(tmp_path, *safe) as servers:
        # The replica's history is that of what survives.
        ways = {"notes_url": redis_server.url, "history_url": servers.second.url}
        with chaos_on(servers.url, tmp_path, rng, **ways) as chaos, chaos.nodes(3, pools=POOLS) as nodes:
            nodes.wait_ready()
            with chaos.load() as load:
                wait_for_more(chaos, load, 30)
                fault(servers)
                doubtful = set(load.expected) - chaos.history.committed
                servers.wait_switched()
                doubtful |= set(load.expected) - chaos.history.committed
                wait_until_all_work(chaos, fault.__name__)
                bring_back(servers)
                servers.wait_demoted()
                wait_for_more(chaos, load, 30)
                settle(chaos, load, doubtful)
            assert [worker.exit_code() for worker in nodes.alive] == [None] * 3


def wait_for_more(chaos: Chaos, load: Load, number: int) -> None:
    """Wait until so many more jobs were accepted and have ended."""
    before = set(load.expected)
    wait_until(lambda: len(chaos.history.committed & load.expected.keys() - before) > number, END_S, "jobs end")


def wait_until_all_work(chaos: Chaos, fault: str) -> None:
    began_s, history = time.monotonic(), chaos.history
    seen = len(history.commits)
    wait_until(lambda: len({commit.epoch for commit in history.commits[seen:]}) == 3, END_S, "every node works again")
    print(f"{fault}: all nodes worked {time.monotonic() - began_s:.1f} s after the promotion")


def settle(chaos: Chaos, load: Load, doubtful: set[str]) -> None:
    """Hold what survived against the promises. Jobs of which the replica knew no end may be lost with their Redis."""
    load.stop()
    checker = chaos.checker
    wait_until(lambda: set(load.open_jobs) <= doubtful, END_S, "all others end")
    checker.nothing_is_left()
    # None of these waits anywhere, nor is it held.
    lost = load.open_jobs
    print(f"lost with their Redis: {len(lost)} of {len(doubtful)}")
    for job_id in lost:
        del load.expected[job_id]
    checker.every_job_ends(load)
    checker.nothing_is_committed_twice(told=False)
    checker.no_fenced_epoch_commits()
    checker.only_the_killed_are_lost(())
