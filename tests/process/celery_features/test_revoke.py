"""Jobs that are called back."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group, states
from celery.exceptions import TaskRevokedError

from tests.process.celery_features.conftest import END_S, Gate, Jobs
from tests.process.nodes import running
from tests.waiting import wait_until


def assert_revoked(result: Any, reason: str | None = None) -> None:
    """Wait for the end of a job, which must be this one."""
    with pytest.raises(TaskRevokedError, match=reason):
        result.get(timeout=END_S)
    assert result.state == states.REVOKED


def assert_never_started(jobs: Jobs, result: Any) -> None:
    """Wait until every job has ended, and this one without a start: its state alone tells nothing of that."""
    wait_until(jobs.nothing_is_left, END_S, "every job has ended")
    assert jobs.notes(f"started:{result.id}") == []


def test_a_job_in_the_list_can_be_revoked(jobs: Jobs, gate: Gate, busy: list[Any]) -> None:
    result, other = jobs.hold.delay(gate.name), jobs.echo.delay("other")
    jobs.command("revoke", task_id=result.id)
    gate.open()
    assert_revoked(result, "revoked")
    assert other.get(timeout=END_S) == "other"
    assert_never_started(jobs, result)


def test_a_result_can_revoke_its_job(jobs: Jobs) -> None:
    with jobs.drained():
        result = jobs.hold.delay("nothing")
        result.revoke()
        wait_until(
            lambda: all(result.id in known for known in jobs.inspect().revoked().values()), END_S, "all nodes know it"
        )
    assert_revoked(result)


def test_many_jobs_can_be_revoked_at_once(jobs: Jobs) -> None:
    with jobs.drained():
        results = [jobs.hold.delay("nothing") for _ in range(3)]
        jobs.command("revoke", task_id=[result.id for result in results])
    for result in results:
        assert_revoked(result)


def test_a_group_can_be_revoked_as_one(jobs: Jobs) -> None:
    with jobs.drained():
        result = group(jobs.hold.s("nothing") for _ in range(3)).delay()
        result.revoke()
        ids = {member.id for member in result.results}
        wait_until(lambda: all(ids <= {*known} for known in jobs.inspect().revoked().values()), END_S, "all know it")
    for member in result.results:
        assert_revoked(member)


def test_a_step_of_a_chain_can_be_revoked_before_its_turn(jobs: Jobs, gate: Gate) -> None:
    result = chain(jobs.hold.s(gate.name), jobs.note.s("revoked step"), jobs.note.s("revoked step")).delay()
    jobs.wait_started(result.parent.parent)
    jobs.command("revoke", task_id=result.parent.id)
    gate.open()
    assert_revoked(result.parent)
    assert jobs.notes("revoked step") == []


def test_a_running_job_that_is_revoked_without_force_goes_on(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name)
    jobs.wait_started(result)
    jobs.command("revoke", task_id=result.id)
    assert result.state == states.PENDING
    gate.open()
    assert result.get(timeout=END_S) in jobs.node_ids
    assert result.state == states.SUCCESS


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGUSR1"])
def test_a_running_job_is_ended_by_force_and_not_run_again(jobs: Jobs, name: str) -> None:
    result = jobs.hold.delay("nothing")
    jobs.wait_started(result)
    jobs.app.control.revoke(result.id, terminate=True, signal=name)
    if name == "SIGUSR1":
        # It raises SoftTimeLimitExceeded in the job, which may clean up.
        wait_until(result.ready, END_S, "it ends")
    else:
        assert_revoked(result)
    assert jobs.echo.delay("next").get(timeout=END_S) == "next"
    wait_until(jobs.nothing_is_left, END_S, "nothing is left of it")
    assert len(jobs.notes(f"started:{result.id}")) == 1


def test_force_does_not_end_jobs_beside_it(jobs: Jobs, gate: Gate) -> None:
    victim, *others = [jobs.hold.delay(gate.name) for _ in range(4)]
    jobs.wait_started(victim, *others)
    jobs.app.control.revoke(victim.id, terminate=True)
    assert_revoked(victim)
    gate.open()
    assert {other.get(timeout=END_S) for other in others} <= {*jobs.node_ids}
    assert [len(jobs.notes(f"started:{other.id}")) for other in others] == [1, 1, 1]


def test_force_on_a_job_that_has_not_begun_revokes_it(jobs: Jobs, gate: Gate, busy: list[Any]) -> None:
    result = jobs.hold.delay(gate.name)
    jobs.command("revoke", task_id=result.id, terminate=True, signal="SIGTERM")
    gate.open()
    assert_revoked(result)
    assert_never_started(jobs, result)


def test_jobs_are_revoked_by_their_stamps(jobs: Jobs) -> None:
    with jobs.drained():
        stamped, other = jobs.hold.s("nothing"), jobs.echo.s("other")
        stamped.stamp(tenant="anna")
        other.stamp(tenant="bert")
        result, kept = stamped.apply_async(), other.apply_async()
        jobs.command("revoke_by_stamped_headers", headers={"tenant": "anna"})
    assert_revoked(result)
    assert kept.get(timeout=END_S) == "other"
    assert_never_started(jobs, result)


def test_running_jobs_are_ended_by_their_stamps(jobs: Jobs) -> None:
    stamped = jobs.hold.s("nothing")
    stamped.stamp(tenant="carla")
    result = stamped.apply_async()
    jobs.wait_started(result)
    jobs.app.control.revoke_by_stamped_headers({"tenant": ["carla"]}, terminate=True)
    assert_revoked(result)


def test_the_error_callbacks_and_the_chord_of_a_revoked_job_learn_of_it(jobs: Jobs) -> None:
    with jobs.drained():
        result = (group(jobs.hold.s("nothing"), jobs.echo.s(1)) | jobs.echo.s()).delay()
        jobs.command("revoke", task_id=result.parent.results[0].id)
    wait_until(result.ready, END_S, "the chord ends")
    assert result.state == states.FAILURE


def test_a_node_that_joins_later_knows_what_was_revoked(jobs: Jobs) -> None:
    with jobs.drained():
        result = jobs.note.delay("it ran", "revoked before a node came")
        jobs.command("revoke", task_id=result.id)
        with running(jobs.new_node("later")):
            wait_until(jobs.nothing_is_left, END_S, "it is discarded")
    assert_revoked(result)
    assert jobs.notes("revoked before a node came") == []


def test_a_job_that_has_ended_cannot_be_revoked(jobs: Jobs) -> None:
    result = jobs.echo.delay("done")
    assert result.get(timeout=END_S) == "done"
    jobs.command("revoke", task_id=result.id, terminate=True, signal="SIGTERM")
    assert result.state == states.SUCCESS
