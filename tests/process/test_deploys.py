"""Nodes of two releases side by side, and messages that no node can run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import NotRegistered
from kombu.exceptions import ContentDisallowed

from tests.broker import make_message
from tests.process.accounts import END_S, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.newer import make_newer
from tests.process.nodes import running
from tests.waiting import wait_until
from workers.redis_server import RedisServer

NEWER = "tests.process.newer"


@pytest.fixture
def newer(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app of the next release as its producers see it."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_newer()
    yield made
    made.app.close()


def test_jobs_of_a_new_task_go_to_the_nodes_that_know_it(newer: Jobs, new_worker: NewWorker) -> None:
    newest = newer.app.tasks["jobs.newest"]
    with running(new_worker("old1"), new_worker("old2"), new_worker("new", app=NEWER)):
        results = [newest.delay() for _ in range(20)]
        assert {result.get(timeout=END_S) for result in results} == {"new@test"}
        wait_until_nothing_is_left(newer)


def test_a_new_nodes_jobs_wait_for_the_next_that_knows_them_when_it_dies(newer: Jobs, new_worker: NewWorker) -> None:
    newest = newer.app.tasks["jobs.newest"]
    with running(new_worker("old"), new_worker("new1", app=NEWER), new_worker("new2", app=NEWER)) as (_, doomed, _):
        # It stands still, so that what is bound to it stays in its list.
        newer.cluster.drain("new2@test")
        wait_until(lambda: newer.cluster.epochs.knowing("jobs.newest", "llm") == [doomed.id], END_S)
        busy = [newer.work.delay(1.0) for _ in range(8)]
        results = [newest.delay() for _ in range(6)]
        newer.cluster.resume("new2@test")
        doomed.kill()
        assert {result.get(timeout=END_S) for result in results} <= {"new1@test", "new2@test"}
        assert all(result.get(timeout=END_S) for result in busy)
        wait_until_nothing_is_left(newer)


def test_a_task_that_no_node_knows_fails_and_its_callbacks_learn_of_it(newer: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("old")):
        job = newer.app.tasks["jobs.newest"].apply_async(link_error=newer.plain.si(1).set(task_id="told"))
        with pytest.raises(NotRegistered):
            job.get(timeout=END_S)
        assert newer.app.AsyncResult("told").get(timeout=END_S) == 2
        wait_until_nothing_is_left(newer)


def test_a_coordinator_is_no_node_that_knows_a_task(newer: Jobs, new_worker: NewWorker, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "celery", "-A", NEWER, "cluster", "coordinator", "-n", "chief@test"]
    with (
        running(new_worker("old")),
        (tmp_path / "chief.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as chief,
    ):
        try:
            wait_until(lambda: "chief@test" in newer.cluster.epochs.beats(), END_S, "it has joined")
            newest = newer.app.tasks["jobs.newest"]
            # Of the type that a coordinator is said to serve, too.
            for request_type in ("llm", "any"):
                with pytest.raises(NotRegistered):
                    newest.apply_async(request_type=request_type).get(timeout=END_S)
            wait_until_nothing_is_left(newer)
        finally:
            chief.terminate()


def test_a_body_that_is_not_allowed_fails_and_harms_no_other(jobs: Jobs, new_worker: NewWorker) -> None:
    message = json.loads(make_message("pickled", "llm"))
    message["content-type"] = "application/x-python-serialize"
    message["headers"]["task"] = "jobs.work"
    with running(new_worker("a")):
        jobs.cluster.client.lpush("waiting.llm", json.dumps(message))
        jobs.cluster.client.zincrby(jobs.cluster.keys.backlog, 1, "waiting.llm")
        with pytest.raises(ContentDisallowed):
            jobs.app.AsyncResult("pickled").get(timeout=END_S)
        assert jobs.work.delay().get(timeout=END_S) == "a@test"
        wait_until_nothing_is_left(jobs)
