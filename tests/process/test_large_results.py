"""Results that are more than Redis takes: each is the failure of its job, and of no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import chord
from celery.exceptions import ChordError

from cluster_tasks.errors import PayloadTooLarge
from tests.process.accounts import END_S, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until

MOST, TOO_MUCH = 1_000_000, 20_000_000
ENVIRON = {"CLUSTER_MAX_RESULT_BYTES": str(MOST)}


@pytest.fixture(autouse=True)
def _a_redis_that_takes_little(jobs: Jobs) -> Iterator[None]:
    """A longer argument of a command costs the connection, as half a gigabyte does elsewhere."""
    client = jobs.cluster.client
    before = client.config_get("proto-max-bulk-len")
    client.config_set("proto-max-bulk-len", 1 << 20)
    yield
    client.config_set("proto-max-bulk-len", before["proto-max-bulk-len"])


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_result_that_is_too_large_fails_its_job_which_runs_once(pool: str, jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", pool=pool, environ=ENVIRON)) as (node,):
        large = jobs.wordy.delay(TOO_MUCH)
        told = rf"the result of a job of jobs.wordy has 20\d{{6}} bytes and may have {MOST}: .*cluster_max_result_bytes"
        with pytest.raises(PayloadTooLarge, match=told):
            large.get(timeout=END_S)
        assert jobs.work.delay().get(timeout=END_S) == node.id
        assert starts_of(jobs, [large]) == {large.id: 1}
        wait_until_nothing_is_left(jobs)


def test_a_chord_of_which_a_result_is_too_large_fails(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", environ=ENVIRON)):
        joined = chord([jobs.wordy.s(TOO_MUCH), jobs.wordy.s(1)], jobs.verbatim.s())()
        with pytest.raises(ChordError, match="PayloadTooLarge"):
            jobs.app.AsyncResult(joined.id).get(timeout=END_S)
        assert set(starts_of(jobs, joined.parent.results).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_what_is_stored_of_an_error_that_is_too_large_says_that(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", environ=ENVIRON)):
        failing = jobs.verbose.delay(2 * MOST, 0.0)
        with pytest.raises(PayloadTooLarge, match=r"the error of a job of jobs\.verbose has"):
            failing.get(timeout=END_S)
        assert starts_of(jobs, [failing]) == {failing.id: 1}
        wait_until_nothing_is_left(jobs)


def test_a_result_that_nobody_wants_may_have_any_size(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", environ=ENVIRON)) as (node,):
        unwanted = jobs.wordy.apply_async((TOO_MUCH,), ignore_result=True)
        wait_until(lambda: f"[{unwanted.id}] succeeded" in node.read_log(), END_S, "it succeeds")
        wait_until_nothing_is_left(jobs)
