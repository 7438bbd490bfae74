"""Nodes that leave while jobs run: what does not end in time goes to others, and is charged to nobody."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest

from cluster_tasks.errors import NodeLost
from tests.process.accounts import END_S, finish, held_key, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until


def cluster(*words: str) -> Any:
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def wait_until_they_run(jobs: Jobs, results: list[Any]) -> None:
    wait_until(lambda: all(starts_of(jobs, results).values()), END_S, "all run")


def assert_they_wait_uncharged(jobs: Jobs, number: int) -> None:
    """Jobs that were charged wait among the suspects. When they end it is forgotten, so this is asked before."""
    client, keys = jobs.cluster.client, jobs.cluster.keys
    assert jobs.cluster.epochs.lengths() == {keys.waiting_queue("llm"): number}
    assert not list(client.scan_iter(keys.crashes("*")))
    assert "node lost" not in [event.kind for event in jobs.cluster.events.latest(1000)]


def test_what_outlasts_a_drain_is_run_by_others_and_stopped_here(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a"), new_worker("b")) as (leaving, _):
        jobs.cluster.drain("b@test")
        long, once = jobs.stubborn.delay(), jobs.stubborn_once.delay()
        wait_until_they_run(jobs, [long, once])
        children = psutil.Process(leaving.pid).children()
        told = cluster("drain", "a", "--timeout", "0.5")
        assert told == {"node": "a@test", "status": "draining", "handed_over": 0, "handed_back": 2}
        assert not psutil.wait_procs(children, timeout=END_S)[1], "the processes of both jobs were ended"
        assert_they_wait_uncharged(jobs, 2)
        jobs.cluster.resume("b@test")
        assert long.get(timeout=END_S) == "b@test"
        with pytest.raises(NodeLost, match="its node gave it back"):
            once.get(timeout=END_S)
        assert starts_of(jobs, [long, once]) == {long.id: 2, once.id: 1}
        assert jobs.cluster.client.hlen(held_key(jobs, "a@test")) == 0
        assert "jobs handed back" in [event.kind for event in jobs.cluster.events.latest()]
        jobs.cluster.resume("a@test")
        jobs.cluster.drain("b@test")
        again = [jobs.work.delay(0.2) for _ in range(6)]
        assert finish(again) == {"a@test": 6}
        assert cluster("drain", "a", "--wait")["handed_back"] == 0
        wait_until_nothing_is_left(jobs)


def test_what_must_not_run_twice_does_not_though_sigterm_reaches_its_process_too(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a"), new_worker("b")) as (leaving, _):
        jobs.cluster.drain("b@test")
        long, once = jobs.stubborn.delay(), jobs.stubborn_once.delay()
        wait_until_they_run(jobs, [long, once])
        family = psutil.Process(leaving.pid).children()
        jobs.cluster.resume("b@test")
        # As a service manager does that ends all processes of a service.
        leaving.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in leaving.read_log(), END_S, "it ends")
        for child in family:
            child.terminate()
        assert long.get(timeout=END_S) == "b@test"
        with pytest.raises(NodeLost, match="its node gave it back"):
            once.get(timeout=END_S)
        assert starts_of(jobs, [long, once]) == {long.id: 2, once.id: 1}
        wait_until_nothing_is_left(jobs)


def test_sigterm_ends_a_node_within_its_deadline_whatever_it_runs(jobs: Jobs, new_worker: NewWorker) -> None:
    pools = ("prefork", "threads", "solo")
    leaving = [new_worker(pool, pool=pool, slots=1, environ={"CLUSTER_DRAIN_TIMEOUT_S": "1"}) for pool in pools]
    with running(*leaving):
        long = [jobs.stubborn.delay() for _ in pools]
        wait_until_they_run(jobs, long)
        for worker in leaving:
            worker.signal(signal.SIGTERM)
        wait_until(lambda: all(worker.exit_code() is not None for worker in leaving), END_S, "all end")
        assert [worker.exit_code() for worker in leaving] == [0, 0, 0], [worker.read_log() for worker in leaving]
        assert_they_wait_uncharged(jobs, 3)
        assert jobs.cluster.nodes() == []
    with running(new_worker("b", slots=4)):
        assert finish(long) == {"b@test": 3}
        wait_until_nothing_is_left(jobs)


def test_a_fenced_node_stops_what_others_were_given_and_works_again(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")) as (sleeper,):
        long = [jobs.stubborn.delay() for _ in range(2)]
        wait_until_they_run(jobs, long)
        with running(new_worker("b")):
            jobs_of = psutil.Process(sleeper.pid).children()
            sleeper.signal(signal.SIGSTOP)
            assert finish(long) == {"b@test": 2}
            sleeper.signal(signal.SIGCONT)
            assert not psutil.wait_procs(jobs_of, timeout=END_S)[1]
        again = [jobs.work.delay(0.2) for _ in range(6)]
        assert finish(again) == {"a@test": 6}
        wait_until_nothing_is_left(jobs)
