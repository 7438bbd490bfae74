"""Limits of time and of rate."""

from __future__ import annotations

import time

import pytest
from celery import chord, states
from celery.exceptions import ChordError, SoftTimeLimitExceeded, TimeLimitExceeded

from tests.process.celery_features.conftest import END_S, Jobs
from tests.waiting import wait_until


def test_a_job_may_clean_up_at_its_soft_limit(jobs: Jobs) -> None:
    result = jobs.overrun.apply_async((True,), soft_time_limit=3, time_limit=END_S)
    assert result.get(timeout=END_S) == "cleaned up"


def test_a_job_that_does_not_mind_its_soft_limit_fails(jobs: Jobs) -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        jobs.overrun.apply_async(soft_time_limit=3, time_limit=END_S).get(timeout=END_S)


def test_a_job_ends_at_its_hard_limit_and_is_not_run_again(jobs: Jobs) -> None:
    result = jobs.hold.apply_async(("nothing",), time_limit=3, link_error=jobs.new_errback.s(key="hard limit"))
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=END_S)
    failed, error = jobs.wait_for_notes("hard limit")[0]
    assert (failed, "TimeLimitExceeded" in error) == (result.id, True)
    assert jobs.echo.delay("next").get(timeout=END_S) == "next"
    wait_until(jobs.nothing_is_left, END_S, "nothing is left of it")
    assert len(jobs.notes(f"started:{result.id}")) == 1


def test_a_hard_limit_in_a_chord_fails_the_chord(jobs: Jobs) -> None:
    parts = [jobs.overrun.s().set(time_limit=1), jobs.echo.s(1)]
    result = chord(parts, jobs.echo.s()).delay()
    wait_until(result.ready, END_S, "the chord ends")
    assert isinstance(result.result, ChordError)


def test_limits_of_the_call_beat_those_of_the_task(jobs: Jobs) -> None:
    assert jobs.limited.delay().get(timeout=END_S) == [60, 50]
    assert jobs.limited.apply_async(time_limit=40, soft_time_limit=30).get(timeout=END_S) == [40, 30]


def test_nodes_take_new_limits_of_a_task_by_remote_control(jobs: Jobs) -> None:
    answers = jobs.command("time_limit", task_name="features.overrun", soft=None, hard=60)
    assert answers == {node: {"ok": "time limits set successfully"} for node in jobs.node_ids}


def test_a_node_keeps_the_rate_of_a_task(jobs: Jobs) -> None:
    sent_s = time.time()
    for result in [jobs.rare.delay("rate") for _ in range(5)]:
        result.get(timeout=END_S)
    assert_in_turn(jobs.notes("rate"), sent_s, 1.4)


def test_a_rate_can_be_set_by_remote_control(jobs: Jobs) -> None:
    try:
        answers = jobs.command("rate_limit", task_name="features.rare", rate_limit="1/s")
        assert answers == {node: {"ok": "new rate limit set successfully"} for node in jobs.node_ids}
        sent_s = time.time()
        for result in [jobs.rare.delay("new rate") for _ in range(5)]:
            result.get(timeout=END_S)
        assert_in_turn(jobs.notes("new rate"), sent_s, 0.9)
    finally:
        jobs.command("rate_limit", task_name="features.rare", rate_limit="0")


def assert_in_turn(notes: list[tuple[str, float]], sent_s: float, seconds: float) -> None:
    """Assert that each node began one job at most in so many seconds since they were sent.

    Since then, and not since the one before: what a busy machine begins late comes nearer to the next.
    """
    by_node: dict[str, list[float]] = {}
    for node, started_s in notes:
        by_node.setdefault(node, []).append(started_s)
    assert max(map(len, by_node.values())) > 1
    for times in by_node.values():
        assert all(started_s >= sent_s + place * seconds for place, started_s in enumerate(sorted(times))), times


def test_a_failure_that_is_not_acknowledged_is_stored_and_not_run_again(jobs: Jobs) -> None:
    result = jobs.fail_unacknowledged.delay()
    with pytest.raises(ValueError, match="not acknowledged"):
        result.get(timeout=END_S)
    wait_until(jobs.nothing_is_left, END_S, "nothing is left of it")
    assert len(jobs.notes(f"started:{result.id}")) == 1


def test_a_time_out_that_is_not_acknowledged_has_one_result_all_the_same(jobs: Jobs) -> None:
    result = jobs.fail_unacknowledged.apply_async((END_S,), time_limit=3)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=END_S)
    wait_until(jobs.nothing_is_left, END_S, "nothing is left of it")
    assert (result.state, len(jobs.notes(f"started:{result.id}"))) == (states.FAILURE, 1)
