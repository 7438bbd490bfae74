"""What a process of the pool reports of its job arrives, whatever becomes of the broker meanwhile."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.process.accounts import END_S, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until

MORE_THAN_A_PIPE_HOLDS = 1_000_000


def test_a_report_that_is_half_read_when_the_connection_breaks_is_read_to_its_end(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    client = jobs.cluster.client
    with running(new_worker("a", slots=2)) as (worker,):
        node = psutil.Process(worker.pid)
        failing = jobs.verbose.delay(MORE_THAN_A_PIPE_HOLDS, 0.5)
        wait_until(lambda: client.llen(f"test:started:{failing.id}"), END_S, "it runs")
        children = node.children()
        node.suspend()
        # The report fills the pipe. Far less than a lease, within which the node must beat again.
        time.sleep(1.2)
        for child in children:
            child.suspend()
        node.resume()
        time.sleep(0.5)
        # With a free slot the node waits for work, and notices.
        client.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: worker.read_log().count("Connected to redis") > 1, END_S, "the node has lost its connection")
        for child in children:
            child.resume()
        with pytest.raises(ValueError, match="xxx"):
            failing.get(timeout=END_S)
        inspect = jobs.app.control.inspect([worker.id], timeout=5)
        wait_until(lambda: inspect.active() == {worker.id: []}, END_S, "its slot is free")
        wait_until_nothing_is_left(jobs)


def test_a_job_that_a_process_was_sent_when_the_connection_breaks_is_not_delivered_again(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    with running(new_worker("a", slots=2)) as (worker,):
        children = psutil.Process(worker.pid).children()
        for child in children:
            child.suspend()
        sent = jobs.work.delay()
        wait_until(lambda: f"{sent.id}] received" in worker.read_log(), END_S, "it is given to a process")
        time.sleep(0.5)
        client.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: worker.read_log().count("Connected to redis") > 1, END_S, "the node has lost its connection")
        for child in children:
            child.resume()
        assert sent.get(timeout=END_S) == worker.id
        wait_until_nothing_is_left(jobs)
        follower = jobs.work.delay()
        assert follower.get(timeout=END_S) == worker.id
        assert client.llen(f"test:started:{sent.id}") == 1
        assert not client.exists(keys.quarantine)
