"""Nodes that are told to change: their pools, their queues, their end; and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster_tasks import NodeStatus
from tests.process.celery_features.conftest import APP, END_S, Gate, Jobs, jobs_on_nodes
from tests.process.nodes import running
from tests.waiting import wait_until


@pytest.fixture
def roomy(jobs: Jobs) -> Iterator[None]:
    """All jobs go to the second node while it is asked to change."""
    with jobs.drained(jobs.node_ids[0]):
        yield


def held(jobs: Jobs, gate: Gate, count: int) -> None:
    """Send one job more than ``count``, and wait until so many run and the other one waits."""
    results = [jobs.hold.delay(gate.name, f"held {gate.name}") for _ in range(count + 1)]
    jobs.wait_for_notes(f"held {gate.name}", count)
    wait_until(lambda: sum(jobs.cluster.epochs.lengths().values()) == 1, END_S, f"one of {len(results)} waits")
    gate.open()
    for result in results:
        result.get(timeout=END_S)
    assert len(jobs.notes(f"held {gate.name}")) == count + 1


def status_of(jobs: Jobs, node_id: str) -> NodeStatus | None:
    return {node.id: node.status for node in jobs.cluster.nodes()}.get(node_id)


@pytest.mark.usefixtures("roomy")
def test_a_pool_that_grew_runs_more_jobs(jobs: Jobs, gate: Gate) -> None:
    node = jobs.node_ids[1]
    assert "ok" in jobs.command("pool_grow", node, n=1)[node]
    try:
        held(jobs, gate, 3)
    finally:
        assert "ok" in jobs.command("pool_shrink", node, n=1)[node]


@pytest.mark.usefixtures("roomy")
def test_a_pool_that_shrank_runs_fewer_jobs(jobs: Jobs, gate: Gate) -> None:
    node = jobs.node_ids[1]
    assert "ok" in jobs.command("pool_shrink", node, n=1)[node]
    try:
        held(jobs, gate, 1)
    finally:
        assert "ok" in jobs.command("pool_grow", node, n=1)[node]


def test_nodes_begin_and_end_to_consume_an_ordinary_queue(jobs: Jobs) -> None:
    jobs.command("add_consumer", jobs.node_ids[1], queue="reports")
    assert jobs.describe.apply_async(queue="reports").get(timeout=END_S)["hostname"] == jobs.node_ids[1]
    jobs.command("cancel_consumer", jobs.node_ids[1], queue="reports")

    def consumed() -> set[str]:
        return {queue["name"] for queue in jobs.inspect(jobs.node_ids[1]).active_queues()[jobs.node_ids[1]]}

    # A worker answers first, and ends to consume in its next turn.
    wait_until(lambda: "reports" not in consumed(), END_S, "it has ended to consume")
    waiting = jobs.describe.apply_async(queue="reports")
    # The node goes on with its list meanwhile.
    assert jobs.echo.delay("cluster").get(timeout=END_S) == "cluster"
    assert not waiting.ready()
    jobs.command("add_consumer", jobs.node_ids[0], queue="reports")
    assert waiting.get(timeout=END_S)["hostname"] == jobs.node_ids[0]
    jobs.command("cancel_consumer", jobs.node_ids[0], queue="reports")


def test_events_can_be_switched_off_and_on(jobs: Jobs) -> None:
    assert all("ok" in answer for answer in jobs.command("disable_events").values())
    assert jobs.echo.delay("quiet").get(timeout=END_S) == "quiet"
    assert all("ok" in answer for answer in jobs.command("enable_events").values())


def test_one_node_can_be_shut_down_and_its_jobs_go_to_others(jobs: Jobs, gate: Gate) -> None:
    with running(jobs.new_node("leaving")) as (leaving,):
        with jobs.drained():
            results = [jobs.hold.delay(gate.name) for _ in range(6)]
            wait_until(lambda: sum(1 for r in results if jobs.notes(f"started:{r.id}")) == 2, END_S, "two run")
        jobs.app.control.shutdown(destination=[leaving.id])
        wait_until(lambda: status_of(jobs, leaving.id) in (NodeStatus.DRAINING, None), END_S, "it leaves")
        gate.open()
        nodes = [result.get(timeout=END_S) for result in results]
        wait_until(lambda: leaving.exit_code() is not None, END_S, "it is gone")
    assert leaving.exit_code() == 0
    assert nodes.count(leaving.id) == 2
    assert [len(jobs.notes(f"started:{result.id}")) for result in results] == [1] * 6


@pytest.fixture
def one_node(
    request: pytest.FixtureRequest, redis_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    """A node of one slot that was started with an option of its own."""
    with jobs_on_nodes(tmp_path_factory.mktemp("one"), "a", slots=1, options=(request.param,)) as jobs:
        yield jobs


@pytest.mark.parametrize("one_node", ["--autoscale=4,1"], indirect=True)
def test_autoscale_follows_the_load(one_node: Jobs) -> None:
    gate = Gate(one_node)
    try:
        results = [one_node.hold.delay(gate.name) for _ in range(6)]
        wait_until(lambda: sum(1 for r in results if one_node.notes(f"started:{r.id}")) == 4, END_S, "four run")
        (stats,) = one_node.inspect().stats().values()
        assert (stats["autoscaler"]["max"], stats["autoscaler"]["current"]) == (4, 4)
    finally:
        gate.open()
    assert {result.get(timeout=END_S) for result in results} == {"a@test"}


@pytest.mark.parametrize("one_node", ["--autoscale=2,1"], indirect=True)
def test_autoscale_can_be_set_by_remote_control(one_node: Jobs) -> None:
    assert "ok" in one_node.command("autoscale", max=3, min=3)["a@test"]
    gate = Gate(one_node)
    try:
        one_node.wait_started(*[one_node.hold.delay(gate.name) for _ in range(3)])
    finally:
        gate.open()


@pytest.mark.parametrize("one_node", ["--max-tasks-per-child=2"], indirect=True)
def test_processes_are_replaced_after_so_many_jobs(one_node: Jobs) -> None:
    pids = [one_node.describe.delay().get(timeout=END_S)["pid"] for _ in range(5)]
    assert len(set(pids)) == 3


def celery(jobs: Jobs, *arguments: str) -> str:
    """Run a command of ``celery``; return what it printed."""
    environ = {**os.environ, "CLUSTER_BROKER_URL": jobs.server.url}
    command = [sys.executable, "-m", "celery", "-A", APP, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=END_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_purge_removes_what_waits_in_the_lists_of_the_cluster(jobs: Jobs, gate: Gate, busy: list[object]) -> None:
    listed = [jobs.note.delay(number, "purged") for number in range(3)]
    wait_until(lambda: sum(jobs.cluster.epochs.lengths().values()) == 3, END_S, "they wait")
    printed = celery(jobs, "purge", "-f")
    assert "Purged 3 messages" in printed
    assert not jobs.cluster.epochs.lengths()
    gate.open()
    assert jobs.echo.delay("next").get(timeout=END_S) == "next"
    assert not any(result.ready() for result in listed)


def test_purge_of_one_list_leaves_the_others(jobs: Jobs, gate: Gate, busy: list[object]) -> None:
    first, second = (jobs.cluster.keys.node_queue(node) for node in jobs.node_ids)
    jobs.note.apply_async(("lost", "purge of one"), queue=first)
    kept = jobs.note.apply_async(("kept", "purge of one"), queue=second)
    assert "Purged 1 message" in celery(jobs, "purge", "-f", "-Q", first)
    gate.open()
    assert kept.get(timeout=END_S) == "kept"
    assert jobs.notes("purge of one") == ["kept"]


def test_the_command_line_calls_jobs_and_shows_results(jobs: Jobs) -> None:
    job_id = celery(jobs, "call", "features.add", "-a", "[1, 2]").strip()
    assert jobs.app.AsyncResult(job_id).get(timeout=END_S) == 3
    assert celery(jobs, "result", job_id).strip() == "3"
    assert "pong" in celery(jobs, "inspect", "ping", "-t", str(END_S), "-d", ",".join(jobs.node_ids))
