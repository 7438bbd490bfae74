"""Jobs that take long, wait long, or hold up the process they run in: each runs once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from celery.exceptions import TaskRevokedError

from tests.process.accounts import END_S, held_key, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until


@pytest.mark.timeout(240)
def test_no_job_runs_twice_because_it_is_long_or_late(jobs: Jobs, new_worker: NewWorker) -> None:
    prefork, threads, solo = (
        new_worker("a", slots=1),
        new_worker("b", pool="threads", slots=1),
        new_worker("c", pool="solo"),
    )
    with running(new_worker("doomed")) as (doomed,):
        delayed = jobs.work.apply_async(countdown=30)
        (waiting,) = jobs.cluster.delayed()
        assert waiting.node == doomed.id
        with running(prefork):
            doomed.kill()
            long = jobs.work.apply_async((20,), queue="node.a@test.bound")
            wait_until(lambda: starts_of(jobs, [long])[long.id], END_S, "it runs on the prefork node")
            with running(threads):
                hog = jobs.hog.apply_async((13,), queue="node.b@test.bound")
                wait_until(lambda: starts_of(jobs, [hog])[hog.id], END_S, "it runs on the node with threads")
                with running(solo):
                    alone = jobs.work.apply_async((12,), queue="node.c@test.bound")
                    results = [long, hog, alone, delayed]
                    assert [result.get(timeout=90) for result in results[:3]] == ["a@test", "b@test", "c@test"]
                    assert delayed.get(timeout=90) in ("a@test", "b@test", "c@test")
                    ended = delayed.date_done.replace(tzinfo=UTC).timestamp()
                    # On time, within what a busy machine may take.
                    assert 0 <= ended - waiting.due < 10
                    assert set(starts_of(jobs, results).values()) == {1}
                    lost = [event for event in jobs.cluster.events.latest() if event.kind == "node lost"]
                    assert [event.facts["node"] for event in lost] == [doomed.id]
                    wait_until_nothing_is_left(jobs)


def test_delayed_jobs_wait_in_redis_and_take_no_slot(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=1)) as (worker,):
        late = [jobs.work.apply_async(countdown=3600) for _ in range(20)]
        soon = jobs.work.apply_async(eta=datetime.now(UTC) + timedelta(seconds=1))
        assert jobs.work.delay().get(timeout=END_S) == soon.get(timeout=END_S) == worker.id
        assert jobs.cluster.client.hlen(held_key(jobs, worker.id)) == 0
        assert len(jobs.cluster.delayed()) == 20
        shown = jobs.app.control.inspect([worker.id], timeout=END_S, limit=1).scheduled()
        assert {entry["request"]["id"] for entry in shown[worker.id]} == {result.id for result in late}
        assert jobs.app.control.purge() == 20
        assert not jobs.cluster.delayed()


def test_a_job_that_was_revoked_while_no_node_lived_never_runs(jobs: Jobs, new_worker: NewWorker) -> None:
    waiting, delayed = jobs.work.delay(), jobs.work.apply_async(countdown=3)
    for job in (waiting, delayed):
        job.revoke()
    with running(new_worker("a")):
        for job in (waiting, delayed):
            with pytest.raises(TaskRevokedError):
                job.get(timeout=END_S)
        wait_until_nothing_is_left(jobs)
        assert not any(starts_of(jobs, [waiting, delayed]).values())


def test_who_joins_after_a_revocation_knows_it(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=1)) as (first,):
        busy = jobs.work.delay(600)
        wait_until(lambda: starts_of(jobs, [busy])[busy.id], END_S, "it runs")
        waits = jobs.work.delay()
        waits.revoke()
        with running(new_worker("b")):
            with pytest.raises(TaskRevokedError):
                waits.get(timeout=END_S)
            assert not starts_of(jobs, [waits])[waits.id]
            busy.revoke(terminate=True)
            with pytest.raises(TaskRevokedError):
                busy.get(timeout=END_S)
            assert first.exit_code() is None
