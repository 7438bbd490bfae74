"""Jobs that ask for another try."""

from __future__ import annotations

import pytest
from celery import chain, states

from tests.process.celery_features.conftest import END_S, Jobs
from tests.waiting import wait_until


def test_a_job_that_waits_for_its_retry_says_so(jobs: Jobs) -> None:
    result = jobs.flaky.delay(1, countdown=4)
    wait_until(lambda: result.state == states.RETRY, END_S, "it waits for its retry")
    assert "try 0" in str(result.info)
    assert len(result.get(timeout=END_S)) == 2
    assert result.state == states.SUCCESS


def test_a_job_without_tries_left_fails_with_its_own_error(jobs: Jobs) -> None:
    result = jobs.flaky.delay(5)
    with pytest.raises(ValueError, match="try 3"):
        result.get(timeout=END_S)
    assert len(jobs.notes(f"tries:{result.id}")) == 4


def test_the_number_of_tries_can_be_set_by_the_retry(jobs: Jobs) -> None:
    result = jobs.flaky.delay(5, max_retries=1)
    with pytest.raises(ValueError, match="try 1"):
        result.get(timeout=END_S)


def test_a_retry_can_have_other_arguments(jobs: Jobs) -> None:
    assert jobs.count_down.delay(3).get(timeout=END_S) == 3


def test_a_retry_keeps_headers_and_priority(jobs: Jobs) -> None:
    result = jobs.flaky.apply_async((2,), headers={"tenant": "anna"}, priority=6)
    tries = result.get(timeout=END_S)
    assert [(priority, headers["tenant"]) for _, priority, headers in tries] == [(6, "anna")] * 3


def test_a_retry_keeps_its_place_in_a_chain(jobs: Jobs) -> None:
    assert chain(jobs.echo.s(2), jobs.count_down.s(), jobs.add.s(10)).delay().get(timeout=END_S) == 12


def test_listed_errors_are_retried_with_a_growing_delay(jobs: Jobs) -> None:
    result = jobs.impatient.delay(2)
    assert result.get(timeout=END_S) == 2
    first, second, third = jobs.notes(f"times:{result.id}")
    assert second - first >= 1
    assert third - second >= 2


def test_listed_errors_fail_a_job_that_has_no_tries_left(jobs: Jobs) -> None:
    result = jobs.impatient.delay(9)
    with pytest.raises(ConnectionError, match="away"):
        result.get(timeout=END_S)
    assert len(jobs.notes(f"times:{result.id}")) == 3


def test_errors_that_are_excepted_are_not_retried(jobs: Jobs) -> None:
    result = jobs.impatient.delay(1, reset=True)
    with pytest.raises(ConnectionResetError):
        result.get(timeout=END_S)
    assert len(jobs.notes(f"times:{result.id}")) == 1


def test_error_callbacks_run_once_after_the_last_try(jobs: Jobs) -> None:
    result = jobs.flaky.apply_async((9,), link_error=jobs.old_errback.s("after the last try"))
    with pytest.raises(ValueError, match="try 3"):
        result.get(timeout=END_S)
    assert jobs.wait_for_notes("after the last try") == [result.id]
