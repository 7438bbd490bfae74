"""``cluster-tasks up --autoscale``: nodes come with the jobs and go without them, and no job is lost by it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.process.accounts import finish, started_by, starts_of, wait_until_nothing_is_left
from tests.process.jobs import Jobs, make_jobs
from tests.process.test_machine import START_S, broker_url_of, up
from tests.waiting import wait_until
from workers.local import local_node_id
from workers.supervision import RUNNING, SOCKET_PATH_MAX, SupervisorClient

SECOND = local_node_id("node2")


@contextmanager
def scaled(directory: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Iterator[tuple[Jobs, SupervisorClient]]:
    """A cluster of one node, and of two while jobs wait, that is soon content with one again."""
    wanted = ("--autoscale", "1,2", "--scale-down-after", "1", "--concurrency", "2", "--pool", "threads")
    with up(directory, *wanted, "--app", "tests.process.jobs", *options, nodes=None):
        monkeypatch.setenv("CLUSTER_BROKER_URL", broker_url_of(directory))
        jobs = make_jobs()
        try:
            yield jobs, SupervisorClient(directory)
        finally:
            jobs.app.close()


def feed(jobs: Jobs, until: Callable[[list[Any]], bool]) -> list[Any]:
    """Let jobs wait until that is so; return all that were sent."""
    sent: list[Any] = []

    def is_so() -> bool:
        if sum(jobs.cluster.epochs.lengths().values()) < 10:
            sent.extend(jobs.work.delay(0.5, key=str(number)) for number in range(10))
        return until(sent)

    wait_until(is_so, START_S, "node2 is called")
    return sent


def joined(jobs: Jobs) -> bool:
    return SECOND in jobs.cluster.epochs.beats()


@pytest.mark.timeout(600)
def test_a_node_starts_while_jobs_wait_and_drains_when_none_do_and_no_job_is_lost(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scaled(tmp_path, monkeypatch) as (jobs, supervisor):
        assert supervisor.states()["node2"] == "STOPPED"
        results = feed(jobs, lambda sent: joined(jobs) and started_by(jobs, sent, SECOND) > 0)
        done = finish(results)
        wait_until(lambda: supervisor.states()["node2"] == "STOPPED", START_S, "node2 ends")
        assert supervisor.states()["node1"] == RUNNING
        assert starts_of(jobs, results).total() == done.total() == len(results), "each ran once"
        kinds = [event.kind for event in jobs.cluster.events.latest(1000)]
        assert (kinds.count("node lost"), kinds.count("jobs handed back")) == (0, 0), (
            "it drained, and left in good order"
        )

        # One job is no reason for two nodes, and nobody is killed for it: who has it ends it first.
        results = feed(jobs, lambda _: joined(jobs))
        more = [jobs.work.apply_async((20,), queue=jobs.cluster.keys.node_queue(SECOND))]
        finish(results)
        wait_until(lambda: starts_of(jobs, more).total(), START_S, "the last one runs")
        wait_until(lambda: jobs.cluster.epochs.lists().draining or more[0].ready(), START_S, "a node drains")
        before = started_by(jobs, more, SECOND)
        assert finish(more).total() == 1
        assert starts_of(jobs, more).total() == 1, f"it ran on {'node2' if before else 'node1'}, to its end"
        wait_until(lambda: supervisor.states()["node2"] == "STOPPED", START_S, "node2 ends")
        wait_until_nothing_is_left(jobs)
        told = (tmp_path / "up.log").read_text()
        assert "node2 to help" in told
        assert "node2 drains, and ends then" in told
        assert "node2 has ended" in told


@pytest.mark.timeout(600)
def test_a_rolling_restart_leaves_out_the_nodes_that_are_not_needed(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scaled(tmp_path, monkeypatch) as (_, supervisor):
        command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "restart", "--rolling"]
        done = subprocess.run(
            [*command, "--data-dir", str(tmp_path)], env=os.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [line.partition("@")[0] for line in done.stdout.splitlines()] == ["node1", "coordinator"]
        assert supervisor.states()["node2"] == "STOPPED"


def test_a_folder_whose_path_leaves_no_room_for_the_socket_is_refused(redis_binary: str, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * SOCKET_PATH_MAX)
    command = [sys.executable, "-m", "workers.up", "--autoscale", "1,2", "--no-flower", "--data-dir", str(deep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode != 0
    assert "no control socket where the path is so long" in done.stderr
