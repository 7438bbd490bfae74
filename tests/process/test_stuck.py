"""Nodes that beat and do not work: they give their jobs to others and exit. Those that only work long go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from cluster_tasks.errors import QuarantinedError
from tests.process.accounts import END_S, finish, held_key, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.process.stuck import HOLDS_UP
from tests.waiting import wait_until

STUCK_S = 5.0
ENVIRON = {"CLUSTER_STUCK_S": str(STUCK_S)}


def only_on(node_id: str, jobs: Jobs, send: Callable[[], Any], began: Callable[[Any], bool]) -> Any:
    """Send a job that only this node can take, and wait until it has."""
    others = jobs.cluster.epochs.beats().keys() - {node_id}
    for other in others:
        jobs.cluster.drain(other)
    job = send()
    wait_until(lambda: began(job), END_S, f"{node_id} has it")
    for other in others:
        jobs.cluster.resume(other)
    return job


@pytest.mark.timeout(240)
def test_a_node_that_beats_and_does_not_work_gives_its_jobs_away_and_exits(jobs: Jobs, new_worker: NewWorker) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    loop, consumer, pool = (new_worker(name, app="tests.process.stuck", environ=ENVIRON) for name in "lcp")
    reasons = {loop: "the event loop", consumer: "the consumer", pool: "the pool"}
    with running(*reasons):
        # Each has a free slot left.
        long = [
            only_on(worker.id, jobs, jobs.stubborn.delay, lambda job: bool(starts_of(jobs, [job])[job.id]))
            for worker in reasons
        ]
        poison = only_on(
            loop.id,
            jobs,
            lambda: jobs.work.apply_async(task_id=HOLDS_UP),
            lambda _: client.hlen(held_key(jobs, loop.id)) == 2,
        )
        jobs.app.control.broadcast("stop_fetching", destination=[consumer.id])
        for child in psutil.Process(pool.pid).children():
            os.kill(child.pid, signal.SIGSTOP)
        waiting = [jobs.work.delay(key=str(number)) for number in range(4)]
        for worker in reasons:
            wait_until(lambda worker=worker: worker.exit_code() is not None, END_S, f"{worker.id} gives up")
        assert [worker.exit_code() for worker in reasons] == [os.EX_SOFTWARE] * 3
        told = {event.facts["node"]: event.facts["reason"] for event in jobs.cluster.events.latest(1000)
                if event.kind == "node stuck"}  # fmt: skip
        assert all(told[worker.id].startswith(reason) for worker, reason in reasons.items()), told
        assert "never_get_done" in loop.read_log(), "the log says where the loop hangs"
        charged = [job for job in (poison, *long, *waiting) if client.exists(keys.crashes(job.id))]
        assert charged == [poison], "it would have held up the next node, too"
    with running(new_worker("b", slots=4, environ=ENVIRON)):
        assert finish([poison, *long, *waiting]) == {"b@test": 8}
        wait_until_nothing_is_left(jobs)


@pytest.mark.timeout(240)
def test_a_message_that_holds_up_three_nodes_is_not_read_by_a_fourth(jobs: Jobs, new_worker: NewWorker) -> None:
    poison = jobs.work.apply_async(task_id=HOLDS_UP)
    options: dict[str, Any] = {"app": "tests.process.stuck", "environ": ENVIRON, "pool": "threads"}
    for name in "abc":
        held_up = new_worker(name, **options).start()
        wait_until(lambda held_up=held_up: held_up.exit_code() is not None, END_S, f"{held_up.id} gives up")
    with running(new_worker("d", **options)) as (last,):
        with pytest.raises(QuarantinedError):
            poison.get(timeout=END_S)
        assert jobs.work.delay().get(timeout=END_S) == last.id
        assert [kept.id for kept in jobs.cluster.quarantine.jobs()] == [poison.id]
        wait_until_nothing_is_left(jobs)


@pytest.mark.timeout(240)
def test_who_works_long_or_was_told_not_to_consume_is_not_stuck(jobs: Jobs, new_worker: NewWorker) -> None:
    solo, threads = (new_worker(pool, pool=pool, slots=1, environ=ENVIRON) for pool in ("solo", "threads"))
    cancelled = new_worker("cancelled", environ=ENVIRON)
    with running(cancelled):
        jobs.app.control.cancel_consumer(jobs.cluster.keys.node_queue(cancelled.id), destination=[cancelled.id])
        wait_until(lambda: "Canceling queue" in cancelled.read_log(), END_S, "it does not consume")
        with running(solo):
            long = jobs.work.delay(4 * STUCK_S)
            wait_until(lambda: starts_of(jobs, [long])[long.id], END_S, "it runs on solo")
            with running(threads):
                hog = jobs.hog.delay(int(2 * STUCK_S))
                assert hog.get(timeout=END_S) == threads.id
                assert long.get(timeout=END_S) == solo.id
                threading.Event().wait(1)
                assert [worker.exit_code() for worker in (solo, threads, cancelled)] == [None] * 3
                assert {event.kind for event in jobs.cluster.events.latest(1000)}.isdisjoint(
                    {"node stuck", "node lost"}
                )
