"""Jobs that do not end well, or say that they did not."""

from __future__ import annotations

import pytest
from celery import chain, chord, group, states
from celery.exceptions import Reject

from cluster_tasks.errors import InvalidArguments
from tests.process.celery_features.conftest import END_S, Gate, Jobs
from tests.process.celery_features.jobs import Refused
from tests.waiting import wait_until


def test_an_error_of_several_arguments_keeps_them(jobs: Jobs) -> None:
    with pytest.raises(Refused) as caught:
        jobs.fail_oddly.delay("refused").get(timeout=END_S)
    assert (caught.value.code, caught.value.reason) == (7, "no")


def test_an_error_that_cannot_be_pickled_is_a_failure_like_any_other(jobs: Jobs) -> None:
    result = jobs.fail_oddly.delay("local")
    wait_until(result.ready, END_S, "it fails")
    assert result.state == states.FAILURE
    assert "Local" in repr(result.result) + result.traceback


def test_wrong_arguments_are_refused_in_the_caller(jobs: Jobs) -> None:
    with pytest.raises(InvalidArguments, match="missing a required argument: 'y'"):
        jobs.add.delay(1)


def test_wrong_arguments_in_a_chain_fail_their_step(jobs: Jobs) -> None:
    result = chain(jobs.echo.s(1), jobs.add.s(2, 3)).delay()
    with pytest.raises(TypeError):
        result.get(timeout=END_S)
    assert result.parent.state == states.SUCCESS


def test_a_task_that_nobody_knows_is_not_lost_in_silence(jobs: Jobs) -> None:
    result = jobs.app.send_task("features.unheard_of", queue=jobs.cluster.keys.node_queue(jobs.node_ids[0]))
    wait_until(result.ready, END_S, "it fails")
    assert result.state == states.FAILURE


def test_a_rejected_job_is_delivered_again_if_it_asks_for_that(jobs: Jobs) -> None:
    result = jobs.reject.delay(True)
    assert result.get(timeout=END_S) == 2
    assert jobs.notes(f"started:{result.id}") == [False, True]


def test_a_rejected_job_that_does_not_come_back_has_failed(jobs: Jobs) -> None:
    result = jobs.reject.delay(False)
    with pytest.raises(Reject):
        result.get(timeout=END_S)
    assert len(jobs.notes(f"started:{result.id}")) == 1


def test_an_ignored_job_leaves_no_result_and_does_not_come_back(jobs: Jobs) -> None:
    result = jobs.ignore.delay()
    jobs.wait_for_notes(f"started:{result.id}")
    wait_until(jobs.nothing_is_left, END_S, "it is let go")
    assert (result.state, len(jobs.notes(f"started:{result.id}"))) == (states.PENDING, 1)


@pytest.mark.parametrize("state", ["SKIPPED", states.FAILURE])
def test_an_ignored_job_keeps_the_state_that_it_gave_itself(jobs: Jobs, state: str) -> None:
    result = jobs.ignore.delay("SKIPPED") if state == "SKIPPED" else jobs.end_by_hand.delay("stored by hand")
    wait_until(lambda: result.state == state, END_S, "its state is seen")
    wait_until(jobs.nothing_is_left, END_S, "it is let go")
    assert result.state == state


@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE])
@pytest.mark.parametrize(("then", "runs"), [("return", 1), ("retry", 2), ("die", 2)])
def test_an_end_that_a_job_tells_before_it_comes_to_it_is_no_end(jobs: Jobs, state: str, then: str, runs: int) -> None:
    result = chain(jobs.tell_an_end.s(state, then), jobs.add.s(10)).delay()
    # The parents of a chain are not asked, which may be in the state that they told.
    assert result.get(timeout=END_S, propagate=False) == runs + 10

    def stored() -> tuple[object, object]:
        meta = jobs.app.backend.get_task_meta(result.parent.id, cache=False)
        return meta["status"], meta["result"]

    # Celery sends the next step before it stores the end of this one.
    wait_until(lambda: stored() == (states.SUCCESS, runs), END_S, "its end is stored")


def test_an_error_replaces_what_its_job_told_before(jobs: Jobs) -> None:
    result = jobs.tell_an_end.apply_async((states.FAILURE, "fail"), link_error=jobs.old_errback.s("told and raised"))
    assert jobs.wait_for_notes("told and raised") == [result.id]
    assert str(result.result) == "raised"


def test_a_job_whose_process_is_killed_is_run_again(jobs: Jobs) -> None:
    result = jobs.die.delay(1)
    assert result.get(timeout=END_S) == 2


def test_a_part_of_a_chord_whose_process_is_killed_is_run_again(jobs: Jobs) -> None:
    assert chord([jobs.die.s(1), jobs.echo.s(3)], jobs.total.s()).delay().get(timeout=END_S) == 5


def test_jobs_beside_one_whose_process_is_killed_are_run_once(jobs: Jobs, gate: Gate) -> None:
    beside = [jobs.hold.delay(gate.name) for _ in range(3)]
    jobs.wait_started(*beside)
    assert jobs.die.delay(1).get(timeout=END_S) == 2
    gate.open()
    assert {result.get(timeout=END_S) for result in beside} <= {*jobs.node_ids}
    assert [len(jobs.notes(f"started:{result.id}")) for result in beside] == [1, 1, 1]


def test_a_job_that_kills_every_process_fails_and_its_callbacks_learn_of_it(jobs: Jobs) -> None:
    result = jobs.die.apply_async((99,), link_error=jobs.old_errback.s("quarantined"))
    wait_until(result.ready, END_S, "it is given up")
    assert (result.state, len(jobs.notes(f"started:{result.id}"))) == (states.FAILURE, 3)
    assert "QuarantinedError" in repr(result.result)
    assert jobs.wait_for_notes("quarantined") == [result.id]
    assert jobs.echo.delay("next").get(timeout=END_S) == "next"


@pytest.mark.parametrize(
    ("outcome", "hooks", "sent"),
    [
        ("return", ["on_success", "after_return"], ["received", "prerun", "success", "postrun"]),
        ("fail", ["on_failure", "after_return"], ["received", "prerun", "failure", "postrun"]),
        (
            "retry",
            ["on_retry", "on_success", "after_return"],
            ["received", "prerun", "retry", "postrun", "received", "prerun", "success", "postrun"],
        ),
    ],
)
def test_hooks_and_signals_of_a_task_tell_how_it_went(
    jobs: Jobs, outcome: str, hooks: list[str], sent: list[str]
) -> None:
    result = jobs.watched.delay(outcome)
    wait_until(result.ready, END_S, "it ends")
    # A retry may run before the process that sent it has told all.
    assert sorted(jobs.wait_for_notes(f"signals:{result.id}", len(sent))) == sorted(sent)
    assert sorted(name for name, _ in jobs.wait_for_notes(f"hooks:{result.id}", len(hooks))) == sorted(hooks)


def test_an_error_callback_of_a_group_is_called_for_each_failure(jobs: Jobs) -> None:
    members = group(jobs.fail.s(1), jobs.fail.s(2))
    members.link_error(jobs.note.si("failed", "errback of a group"))
    result = members.apply_async()
    wait_until(result.ready, END_S, "both fail")
    assert jobs.wait_for_notes("errback of a group", 2) == ["failed", "failed"]
