"""What every pool must do alike: canvases, retries, delays, revocations, results that nobody wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import chain, chord, group, states
from celery.exceptions import TaskRevokedError

from tests.process.celery_features.conftest import END_S, Jobs, jobs_on_nodes, values
from tests.waiting import wait_until


@pytest.fixture(scope="module", params=["threads", "solo", "prefork"])
def jobs(request: pytest.FixtureRequest, redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Two nodes of each pool."""
    with jobs_on_nodes(tmp_path_factory.mktemp(request.param), "a", "b", pool=request.param) as jobs:
        yield jobs


def test_a_chain_passes_its_values_on(jobs: Jobs) -> None:
    assert chain(jobs.add.s(1, 2), jobs.add.s(3), jobs.add.s(4)).delay().get(timeout=END_S) == 10


def test_a_groups_values_keep_their_order(jobs: Jobs) -> None:
    assert group(jobs.echo.s(number) for number in range(12)).delay().get(timeout=END_S) == list(range(12))


def test_a_chord_gives_all_values_to_its_body(jobs: Jobs) -> None:
    parts = [jobs.add.s(number, 1) for number in range(8)]
    assert chord(parts, jobs.total.s()).delay().get(timeout=END_S) == sum(range(1, 9))


def test_a_chord_in_the_middle_of_a_chain_takes_and_gives_values(jobs: Jobs) -> None:
    canvas = jobs.add.s(1, 1) | group(jobs.add.s(10), jobs.add.s(20)) | jobs.total.s() | jobs.add.s(100)
    assert canvas.delay().get(timeout=END_S) == 134


def test_a_failure_comes_to_the_caller_with_its_type_and_words(jobs: Jobs) -> None:
    result = jobs.fail.delay("so")
    with pytest.raises(ValueError, match=r"refused \['so'\]"):
        result.get(timeout=END_S)
    assert result.state == states.FAILURE
    assert "in fail" in result.traceback


def test_a_lack_of_memory_is_a_failure_like_any_other(jobs: Jobs) -> None:
    # More than there are slots: none may be lost to it.
    for result in [jobs.fail_oddly.delay("memory") for _ in range(5)]:
        with pytest.raises(MemoryError, match="no room"):
            result.get(timeout=END_S)
    assert jobs.echo.delay("next").get(timeout=END_S) == "next"
    wait_until(jobs.nothing_is_left, END_S, "nothing is left of it")
    assert [node.exit_code() for node in jobs.nodes] == [None, None]


def test_a_retry_at_once_ends_after_so_many_tries(jobs: Jobs) -> None:
    tries = jobs.flaky.delay(2).get(timeout=END_S)
    assert [retries for retries, *_ in tries] == [0, 1, 2]


def test_a_retry_with_a_countdown_ends_after_so_many_tries(jobs: Jobs) -> None:
    tries = jobs.flaky.delay(1, countdown=0.5).get(timeout=END_S)
    assert [retries for retries, *_ in tries] == [0, 1]


def test_a_job_with_a_countdown_runs(jobs: Jobs) -> None:
    assert jobs.add.apply_async((1, 2), countdown=0.5).get(timeout=END_S) == 3


def test_a_job_that_was_revoked_before_it_was_fetched_does_not_run(jobs: Jobs) -> None:
    with jobs.drained():
        result, other = jobs.hold.delay("nothing"), jobs.echo.delay("run")
        jobs.command("revoke", task_id=result.id)
    assert other.get(timeout=END_S) == "run"
    with pytest.raises(TaskRevokedError):
        result.get(timeout=END_S)
    wait_until(jobs.nothing_is_left, END_S, "it is discarded")
    assert (result.state, jobs.notes(f"started:{result.id}")) == (states.REVOKED, [])


def test_a_result_that_the_task_ignores_is_not_stored(jobs: Jobs) -> None:
    result = jobs.note_silently.delay("value", "silent")
    assert jobs.wait_for_notes("silent")[-1] == "value"
    assert jobs.app.backend.get(jobs.app.backend.get_key_for_task(result.id)) is None


def test_a_result_that_the_caller_ignores_is_not_stored(jobs: Jobs) -> None:
    result = jobs.note.apply_async(("value", "ignored"), ignore_result=True)
    assert result.get(timeout=END_S) is None
    assert jobs.wait_for_notes("ignored")[-1] == "value"
    assert jobs.app.backend.get(jobs.app.backend.get_key_for_task(result.id)) is None


def test_links_run_after_a_success_and_error_links_after_a_failure(jobs: Jobs) -> None:
    done = jobs.echo.apply_async(("done",), link=jobs.note.s("linked"))
    failed = jobs.fail.apply_async(link=jobs.note.s("linked"), link_error=jobs.old_errback.s("failed"))
    assert values([done]) == ["done"]
    assert jobs.wait_for_notes("linked") == ["done"]
    assert jobs.wait_for_notes("failed") == [failed.id]


def test_tasks_of_both_kinds_meet_in_a_canvas(jobs: Jobs) -> None:
    canvas = jobs.plain_add.s(1, 1) | group(jobs.add.s(1), jobs.plain_add.s(2)) | jobs.total.s() | jobs.plain_add.s(1)
    assert canvas.delay().get(timeout=END_S) == 8


def test_a_job_of_more_megabytes_than_a_buffer_comes_and_goes_whole(jobs: Jobs) -> None:
    text = "é" * 1_500_000
    assert jobs.echo.delay(text).get(timeout=END_S) == text
