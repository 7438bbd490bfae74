"""Results in another Redis than jobs: then the end of a job and its delivery are no single step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.accounts import END_S, left_over, let_go, started_by, starts_of
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import running
from tests.servers import redis_for_results
from tests.waiting import wait_until


@pytest.fixture
def jobs(redis_url: str, redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test, with its results in a Redis of their own."""
    with redis_for_results(tmp_path / "results") as results:
        monkeypatch.setenv("CLUSTER_BROKER_URL", redis_url)
        monkeypatch.setenv("CLUSTER_RESULT_BACKEND", results.url)
        made = make_jobs()
        yield made
        made.app.close()


def test_the_first_success_counts_and_a_node_says_so_at_start(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", pool="threads"), new_worker("b", pool="threads")) as (sleeper, other):
        assert "of two nodes that run a job" in sleeper.read_log()
        results = [jobs.patient.delay() for _ in range(4)]
        wait_until(lambda: started_by(jobs, results, sleeper.id) == 2, END_S, "it works")
        sleeper.signal(signal.SIGSTOP)
        let_go(jobs.cluster.client, *results)
        ended = {result.id: result.get(timeout=END_S) for result in results}
        assert set(ended.values()) == {other.id}
        sleeper.signal(signal.SIGCONT)
        wait_until(lambda: sleeper.read_log().count(" succeeded in ") == 2, END_S, "it ends what it ran")
        assert {job_id: jobs.app.backend.get_result(job_id) for job_id in ended} == ended
        assert sorted(starts_of(jobs, results).values()) == [1, 1, 2, 2]
        # Only a commit can take back what a job is charged with; where there is none, that expires.
        wait_until(lambda: all(key.startswith("cluster:crashes:") for key in left_over(jobs)), END_S)
