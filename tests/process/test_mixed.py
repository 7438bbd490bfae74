"""Nodes that also run plain tasks from queues of their own."""

from __future__ import annotations

import pytest

from tests.process.accounts import END_S, finish, held_key, let_go, starts_of
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.mixed import PLAIN
from tests.process.nodes import running
from tests.waiting import wait_until

APP = "tests.process.mixed"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_node_whose_slots_are_full_of_plain_tasks_holds_no_job_that_another_could_run(
    jobs: Jobs, new_worker: NewWorker, pool: str
) -> None:
    client = jobs.cluster.client
    with running(new_worker("a", app=APP, pool=pool, slots=1, options=("-Q", "celery"))):
        plain = jobs.app.send_task(PLAIN)
        wait_until(lambda: starts_of(jobs, [plain])[plain.id], END_S, "the plain task runs")
        wait_until(lambda: jobs.cluster.nodes()[0].load.current_connections == 1, END_S, "the node says so")
        sent = [jobs.work.delay() for _ in range(6)]
        with running(new_worker("b", app=APP, pool=pool, slots=1, options=("-Q", "other"))):
            assert finish(sent) == {"b@test": 6}
        assert client.hlen(held_key(jobs, "a@test")) == 0
        let_go(client, plain)
        assert plain.get(timeout=END_S) == "a@test"
        assert finish([jobs.work.delay()]) == {"a@test": 1}
