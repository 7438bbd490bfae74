"""Two nodes under pytest-celery: what a user's own test of his jobs would look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from cluster_tasks.cluster import cluster_of
from tests.waiting import wait_until

END_S = 120.0
GATE = "test:gate"


@pytest.fixture
def visit(celery_setup: CeleryTestSetup) -> Iterator[Any]:
    """The task that says where it ran."""
    yield celery_setup.app.tasks["jobs.visit"]
    # Nodes wait for what they run before they end: a test that failed must not leave its jobs at the gate.
    open_gate(celery_setup)


def hostnames(setup: CeleryTestSetup) -> set[str]:
    return {node.hostname() for node in setup.worker_cluster}


def online(setup: CeleryTestSetup) -> set[str]:
    return {node.id for node in cluster_of(setup.app).nodes()}


def open_gate(setup: CeleryTestSetup) -> None:
    with setup.broker.container.client as client:
        client.set(GATE, "open")


def received_by(node: CeleryTestWorker, results: list[Any]) -> list[Any]:
    log = node.logs()
    return [result for result in results if f"jobs.visit[{result.id}] received" in log]


def wait_until_each_node_has_two(setup: CeleryTestSetup, results: list[Any]) -> None:
    """Four jobs that wait at the gate fill four slots: no node can have more, whatever its speed."""
    assert len(results) == 4
    wait_until(lambda: all(len(received_by(node, results)) == 2 for node in setup.worker_cluster), END_S, "two each")


def test_two_nodes_and_one_redis_make_a_setup(celery_setup: CeleryTestSetup) -> None:
    names = hostnames(celery_setup)
    assert len(names) == 2
    assert celery_setup.ready(control=True)
    assert online(celery_setup) == names
    assert celery_setup.backend.config() == celery_setup.broker.config()
    command = f"celery -A jobs inspect ping -d {','.join(names)}"
    code, output = celery_setup.worker.container.exec_run(command)
    assert code == 0, output
    assert all(name in output.decode() for name in names)


def test_a_job_runs_on_one_node_and_its_log_says_so(celery_setup: CeleryTestSetup, visit: Any) -> None:
    result = visit.delay([])
    (hostname,) = result.get(timeout=END_S)
    assert celery_setup.app.AsyncResult(result.id).result == [hostname]
    for node in celery_setup.worker_cluster:
        if node.hostname() == hostname:
            node.assert_log_exists(f"jobs.visit[{result.id}] succeeded")
        else:
            node.assert_log_does_not_exist(result.id)


def test_two_nodes_share_a_group_and_its_results_keep_their_order(celery_setup: CeleryTestSetup, visit: Any) -> None:
    result = group(visit.s([number], gate=GATE) for number in range(4)).delay()
    wait_until_each_node_has_two(celery_setup, result.results)
    assert result.completed_count() == 0
    open_gate(celery_setup)
    paths = result.get(timeout=END_S)
    assert [number for number, _ in paths] == [0, 1, 2, 3]
    assert {name for _, name in paths} == hostnames(celery_setup)
    assert result.completed_count() == 4


def test_chains_pass_their_values_on_over_both_nodes(celery_setup: CeleryTestSetup, visit: Any) -> None:
    results = [chain(visit.s(["start"], gate=GATE), visit.s(), visit.s()).delay() for _ in range(4)]
    wait_until_each_node_has_two(celery_setup, [result.parent.parent for result in results])
    open_gate(celery_setup)
    paths = [result.get(timeout=END_S) for result in results]
    assert {len(path) for path in paths} == {4}
    assert {name for path in paths for name in path[1:]} == hostnames(celery_setup)
    assert results[0].parent.parent.result == paths[0][:2]


def test_a_failed_step_ends_its_chain_and_the_caller_learns_why(celery_setup: CeleryTestSetup, visit: Any) -> None:
    refuse = celery_setup.app.tasks["jobs.refuse"]
    result = chain(visit.s([]), refuse.s(), visit.s()).delay()
    with pytest.raises(ValueError, match="refused after 1 steps"):
        result.get(timeout=END_S)
    assert [result.parent.parent.state, result.parent.state] == ["SUCCESS", "FAILURE"]


def test_the_other_node_does_the_jobs_of_one_that_was_killed(celery_setup: CeleryTestSetup, visit: Any) -> None:
    victim, survivor = celery_setup.worker_cluster
    results = [visit.delay([], gate=GATE) for _ in range(8)]
    wait_until(lambda: received_by(victim, results), END_S, "the victim has a job")
    victim.kill()
    assert victim.container.status == "exited"
    open_gate(celery_setup)
    assert [result.get(timeout=END_S) for result in results] == [[survivor.hostname()]] * 8


def test_a_chord_outlives_a_node_that_ran_its_header(celery_setup: CeleryTestSetup, visit: Any) -> None:
    victim, survivor = celery_setup.worker_cluster
    result = chord((visit.s([number], gate=GATE) for number in range(6)), visit.s()).delay()
    wait_until(lambda: received_by(victim, result.parent.results), END_S, "the victim has a part")
    victim.kill()
    open_gate(celery_setup)
    assert result.get(timeout=END_S) == [*([number, survivor.hostname()] for number in range(6)), survivor.hostname()]


def test_a_killed_node_works_again_when_it_is_restarted(celery_setup: CeleryTestSetup, visit: Any) -> None:
    first, second = celery_setup.worker_cluster
    first.kill()
    wait_until(lambda: online(celery_setup) == {second.hostname()}, END_S, "the other notices")
    first.restart()
    wait_until(lambda: online(celery_setup) == hostnames(celery_setup), END_S, "it joins again")
    second.kill()
    assert [visit.delay([]).get(timeout=END_S) for _ in range(3)] == [[first.hostname()]] * 3
