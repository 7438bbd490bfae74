"""What callers get of a job, and when."""

from __future__ import annotations

import pytest
from celery import chain, group, states
from celery.exceptions import TimeoutError as NotReadyYet
from celery.result import GroupResult, ResultSet, result_from_tuple

from tests.process.celery_features.conftest import END_S, Gate, Jobs, values
from tests.waiting import wait_until


def test_a_result_can_be_asked_for_by_id(jobs: Jobs) -> None:
    sent = jobs.add.delay(1, 2)
    assert jobs.app.AsyncResult(sent.id).get(timeout=END_S) == 3
    assert jobs.add.AsyncResult(sent.id).successful()


def test_who_waits_too_short_is_told_so(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name)
    with pytest.raises(NotReadyYet):
        result.get(timeout=0.1)
    gate.open()
    assert result.get(timeout=END_S) in jobs.node_ids


def test_a_failure_can_be_had_without_being_raised(jobs: Jobs) -> None:
    result = jobs.fail.delay()
    assert isinstance(result.get(timeout=END_S, propagate=False), ValueError)
    assert (result.failed(), result.successful(), result.ready()) == (True, False, True)


def test_a_result_that_was_forgotten_is_gone(jobs: Jobs) -> None:
    result = jobs.add.delay(1, 2)
    assert result.get(timeout=END_S) == 3
    result.forget()
    assert jobs.app.AsyncResult(result.id).state == states.PENDING


def test_a_result_knows_what_its_job_sent(jobs: Jobs) -> None:
    result = jobs.send_two.delay()
    sent = result.get(timeout=END_S).split(",")
    assert [child.id for child in result.children] == sent
    assert values(result.children) == [0, 1]


def test_all_results_below_a_job_can_be_collected(jobs: Jobs) -> None:
    result = jobs.send_two.delay()
    result.get(timeout=END_S)
    values(result.children)
    assert sorted(value for _, value in result.collect() if isinstance(value, int)) == [0, 1]


def test_the_states_of_a_task_of_its_own_are_seen(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name, stage="WARMING UP")
    wait_until(lambda: result.state == "WARMING UP", END_S, "the state is seen")
    assert result.info == {"waits_for": gate.name}
    gate.open()
    assert result.get(timeout=END_S) in jobs.node_ids
    assert result.state == states.SUCCESS


def test_a_job_may_set_the_state_of_another(jobs: Jobs) -> None:
    jobs.label.delay("no job of anybody", "LABELLED").get(timeout=END_S)
    assert jobs.app.AsyncResult("no job of anybody").state == "LABELLED"


def test_a_start_is_seen_of_tasks_that_track_it(jobs: Jobs, gate: Gate) -> None:
    result = jobs.tracked.delay(gate.name)
    wait_until(lambda: result.state == states.STARTED, END_S, "its start is seen")
    assert result.info["hostname"] in jobs.node_ids
    gate.open()
    assert result.get(timeout=END_S) == "tracked"


def test_results_come_in_the_order_of_the_set(jobs: Jobs) -> None:
    results = ResultSet([jobs.echo.delay(number) for number in range(5)], app=jobs.app)
    assert results.get(timeout=END_S) == list(range(5))
    assert results.completed_count() == 5


def test_results_can_be_had_as_they_come(jobs: Jobs, gate: Gate) -> None:
    held, quick = jobs.hold.delay(gate.name), jobs.echo.delay("quick")
    ready = []
    for result_id, meta in ResultSet([held, quick], app=jobs.app).iter_native(timeout=END_S):
        ready.append((result_id, meta["result"]))
        gate.open()
    assert ready[0] == (quick.id, "quick")
    assert ready[1][0] == held.id


def test_a_callback_gets_each_value_of_a_group(jobs: Jobs) -> None:
    got: list[int] = []
    group(jobs.echo.s(number) for number in range(4)).delay().get(
        timeout=END_S, callback=lambda _, value: got.append(value)
    )
    assert sorted(got) == [0, 1, 2, 3]


# What Celery calls to save it is deprecated in redis-py.
@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
def test_a_group_result_can_be_saved_and_restored(jobs: Jobs) -> None:
    result = group(jobs.echo.s(number) for number in range(3)).delay()
    result.save()
    restored = GroupResult.restore(result.id, app=jobs.app)
    assert restored.get(timeout=END_S) == [0, 1, 2]
    assert restored.successful()
    restored.delete()
    assert GroupResult.restore(result.id, app=jobs.app) is None


def test_a_failed_member_fails_its_group(jobs: Jobs) -> None:
    result = group(jobs.echo.s(1), jobs.fail.s("member")).delay()
    with pytest.raises(ValueError, match="member"):
        result.get(timeout=END_S)
    wait_until(result.ready, END_S, "all members end")
    assert (result.failed(), result.successful()) == (True, False)


def test_a_result_survives_its_way_through_a_tuple(jobs: Jobs) -> None:
    result = chain(jobs.add.s(1, 1), jobs.add.s(1)).delay()
    assert result_from_tuple(result.as_tuple(), app=jobs.app).get(timeout=END_S) == 3


def test_a_result_that_is_ignored_still_has_its_links(jobs: Jobs) -> None:
    jobs.note_silently.apply_async(("value", "ignored"), link=jobs.note.s("link of ignored"))
    assert jobs.wait_for_notes("link of ignored") == ["value"]


def test_an_ignored_step_of_a_chain_hands_on_its_value(jobs: Jobs) -> None:
    assert chain(jobs.note_silently.s(5, "ignored"), jobs.add.s(1)).delay().get(timeout=END_S) == 6


def test_an_error_is_stored_although_results_are_ignored_if_the_task_says_so(jobs: Jobs) -> None:
    result = jobs.fail_silently.delay()
    stored = jobs.app.AsyncResult(result.id)
    wait_until(lambda: stored.state == states.FAILURE, END_S, "the error is stored")
    assert "told all the same" in str(stored.result)


def test_an_id_has_one_result_although_a_second_job_has_it(jobs: Jobs) -> None:
    first = jobs.note.apply_async(("first", "same id"), task_id="an id used twice")
    assert first.get(timeout=END_S) == "first"
    first.forget()
    second = jobs.note.apply_async(("second", "same id"), task_id=first.id)
    jobs.wait_for_notes("same id", 2)
    wait_until(jobs.nothing_is_left, END_S, "the second is let go")
    assert second.state == states.PENDING
