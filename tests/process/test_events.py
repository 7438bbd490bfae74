"""What monitors are told of jobs: everything, in few publishes."""

from __future__ import annotations

import json
import signal
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.monitored import Monitor, monitored
from tests.process.accounts import END_S, let_go, starts_of
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import NEVER_LOST, running
from tests.waiting import wait_until
from workers.bootsteps import EVENTS_TOGETHER_S
from workers.redis_server import RedisServer

JOBS = 100
OF_A_JOB = "task-received", "task-started", "task-succeeded"
MOST_TOGETHER = 24
"""Of Celery: so many are published without waiting for others."""


class Published(NamedTuple):
    """Events of jobs that were published as one."""

    at_s: float
    events: list[dict[str, Any]]


class Listener:
    """Sees the events of jobs as they are published."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.published: list[Published] = []
        self.last_channel = b""

    def listen(self) -> list[dict[str, Any]]:
        """Return all events until now."""
        for command in self._monitor.commands():
            if command.name != "PUBLISH" or b"celeryev/" not in command.words[1]:
                continue
            self.last_channel = command.words[1]
            if self.last_channel.endswith(b"task.multi"):
                body = json.loads(command.words[2])["body"]
                self.published.append(Published(command.at_s, json.loads(b64decode(body))))
        return [event for each in self.published for event in each.events]

    def told(self) -> Counter[tuple[str, str]]:
        """Return how often each kind of event was told of each job."""
        return Counter((event["uuid"], event["type"]) for event in self.listen())


@pytest.fixture
def listener(redis_server: RedisServer) -> Iterator[Listener]:
    with monitored(redis_server.url) as monitor:
        yield Listener(monitor)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_events_of_many_jobs_are_published_together(
    pool: str, jobs: Jobs, listener: Listener, new_worker: NewWorker
) -> None:
    sent = [jobs.verbatim.delay(number) for number in range(JOBS)]
    with running(new_worker("n1", pool=pool, slots=1, options=("-E",), environ=NEVER_LOST)):
        wait_until(lambda: len(listener.listen()) >= len(OF_A_JOB) * JOBS, END_S, "all is told")
    assert listener.told() == {(result.id, kind): 1 for result in sent for kind in OF_A_JOB}
    published = listener.published
    lasted_s = published[-1].at_s - published[0].at_s
    assert len(published) <= 2 + len(OF_A_JOB) * JOBS / MOST_TOGETHER + lasted_s / EVENTS_TOGETHER_S


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_end_of_a_job_is_told_while_the_next_runs(
    pool: str, jobs: Jobs, listener: Listener, new_worker: NewWorker
) -> None:
    first, second = [jobs.patient.delay() for _ in range(2)]
    with running(new_worker("n1", pool=pool, slots=1, options=("-E",), environ=NEVER_LOST)):
        wait_until(lambda: starts_of(jobs, [first]).total(), END_S, "the first runs")
        let_go(jobs.cluster.client, first)
        wait_until(lambda: starts_of(jobs, [second]).total(), END_S, "the second runs")
        wait_until(lambda: (first.id, OF_A_JOB[-1]) in listener.told(), END_S, "the end of the first is told")
        let_go(jobs.cluster.client, second)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_waits_to_be_published_when_the_connection_breaks_is_published_by_the_next(
    pool: str, jobs: Jobs, listener: Listener, new_worker: NewWorker
) -> None:
    client = jobs.cluster.client

    def have_ended(sent: list[Any]) -> bool:
        return {(result.id, OF_A_JOB[-1]) for result in sent} <= listener.told().keys()

    with running(new_worker("n1", pool=pool, slots=1, options=("-E",), environ=NEVER_LOST)):
        for number in range(5):
            sent = [jobs.verbatim.delay(number) for _ in range(10)]
            assert [result.get(timeout=END_S) for result in sent] == [number] * 10
            # Of the last of them, the events may wait.
            for connection in client.client_list():
                if connection["cmd"] in {"brpop", "evalsha", "publish"}:
                    client.client_kill_filter(_id=connection["id"])
            wait_until(lambda: have_ended(sent), END_S, "the end of each is told")  # noqa: B023 - it is now


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_end_of_a_job_is_told_though_its_node_is_shutting_down(
    pool: str, jobs: Jobs, listener: Listener, new_worker: NewWorker
) -> None:
    with running(new_worker("n1", pool=pool, slots=1, options=("-E",), environ=NEVER_LOST)) as (node,):
        job = jobs.patient.delay()
        wait_until(lambda: starts_of(jobs, [job]).get(job.id), END_S, "it runs")
        node.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in node.read_log(), END_S, "it ends")
        let_go(jobs.cluster.client, job)
        wait_until(lambda: node.exit_code() is not None, END_S, "it has ended")
    assert (job.id, OF_A_JOB[-1]) in listener.told()
    # A monitor takes whoever tells anything after that for alive.
    assert listener.last_channel.endswith(b"worker.offline")


def test_a_node_that_tells_nothing_does_its_jobs(jobs: Jobs, new_worker: NewWorker) -> None:
    # Without Celery's own heartbeat it has no dispatcher of events.
    with running(new_worker("n1", slots=1, options=("--without-heartbeat",))):
        assert jobs.verbatim.delay(1).get(timeout=END_S) == 1
