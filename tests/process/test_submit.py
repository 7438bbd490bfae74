"""Many jobs in one message, on real nodes: each has its own end, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import NotRegistered, Reject, TaskRevokedError, TimeLimitExceeded
from celery.exceptions import TimeoutError as NotInTime

from cluster_tasks.errors import InvalidArguments, PartlySubmitted, PayloadTooLarge, QuarantinedError
from cluster_tasks.redis_store import text
from tests.process.accounts import END_S, starts_of, wait_until_nothing_is_left
from tests.process.batching import BAD, POISON, Batches, make_batches
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until
from workers.redis_server import RedisServer

POOLS = pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
NewWorker = Callable[..., WorkerProcess]


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batches]:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_batches()
    yield made
    made.app.close()


@pytest.fixture
def new_worker(redis_server: RedisServer, tmp_path: Path) -> NewWorker:
    return lambda name, **options: WorkerProcess(
        name, redis_server.url, tmp_path, app="tests.process.batching", **options
    )


def calls_together(jobs: Batches) -> list[int]:
    listed: Any = jobs.cluster.client.lrange("test:together", 0, -1)
    return [int(each) for each in listed]


def messages(jobs: Batches) -> int:
    return sum(jobs.cluster.epochs.lengths().values())


def told(ends: list[Any]) -> list[str]:
    return [end if isinstance(end, str) else f"{type(end).__name__}: {end}" for end in ends]


@POOLS
def test_jobs_of_one_message_are_done_in_one_call_and_one_that_fails_fails_alone(
    pool: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", ("b",), {"word": "c"}, BAD])
    assert messages(jobs) == 1
    with running(new_worker("a", pool=pool)):
        assert told(sent.get(timeout=END_S, propagate=False)) == ["aa", "bb", "cc", f"ValueError: {BAD}"]
        assert calls_together(jobs) == [4]
        # Any process that knows an id can ask.
        assert jobs.app.AsyncResult(sent.ids[2]).get(timeout=END_S) == "cc"
        with pytest.raises(ValueError, match=BAD):
            sent.get(timeout=END_S)
        assert sent.ready()
        wait_until_nothing_is_left(jobs)


@POOLS
def test_jobs_of_a_task_that_cannot_do_them_together_are_done_one_by_one(
    pool: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(jobs.work, ["a", BAD, "b"])
    assert messages(jobs) == 1
    with running(new_worker("a", pool=pool)):
        assert told(sent.get(timeout=END_S, propagate=False)) == ["a a@test", f"ValueError: {BAD}", "b a@test"]
        assert set(starts_of(jobs, list(sent)).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_a_result_that_cannot_be_stored_is_the_failure_of_its_job_alone(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "unsayable", "b"])
    with running(new_worker("a")):
        ends = sent.get(timeout=END_S, propagate=False)
        assert [ends[0], ends[2]] == ["aa", "bb"]
        assert "EncodeError" in type(ends[1]).__name__
        assert not jobs.cluster.quarantine.jobs()


def test_a_result_that_is_too_large_is_the_failure_of_its_job_alone(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "x" * 60_000, "b"])
    with running(new_worker("a", environ={"CLUSTER_MAX_RESULT_BYTES": "100000"})):
        ends = sent.get(timeout=END_S, propagate=False)
        assert [ends[0], ends[2]] == ["aa", "bb"]
        assert isinstance(ends[1], PayloadTooLarge)
        assert calls_together(jobs) == [3]
        assert not starts_of(jobs, list(sent)).total()
        wait_until_nothing_is_left(jobs)


def test_results_tell_of_each_job_what_celery_calls_extended(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "b"])
    with running(new_worker("a", environ={"TEST_EXTENDED": "1"})):
        assert sent.get(timeout=END_S) == ["aa", "bb"]
        metas = [jobs.app.backend.get_task_meta(job_id) for job_id in sent.ids]
        assert [(meta["task_id"], meta["name"], meta["args"]) for meta in metas] == [
            (sent.ids[0], "batches.double", ["a"]),
            (sent.ids[1], "batches.double", ["b"]),
        ]


def test_if_the_call_fails_each_is_done_by_itself(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "breaks all", "b"])
    with running(new_worker("a")):
        ends = told(sent.get(timeout=END_S, propagate=False))
        assert ends == ["aa", "RuntimeError: this one cannot be done", "bb"]
        assert calls_together(jobs) == [3]


@POOLS
def test_a_job_that_is_tried_again_goes_on_alone_under_its_id(pool: str, jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.flaky, [0, 2, 1, 0])
    with running(new_worker("a", pool=pool)):
        assert sent.get(timeout=END_S) == [1, 3, 2, 1]
        wait_until_nothing_is_left(jobs)


@POOLS
def test_a_job_that_rejects_its_message_is_given_it_again_alone_or_fails(
    pool: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(jobs.turned, [0, 1, -1, 0])
    with running(new_worker("a", pool=pool)):
        ends = sent.get(timeout=END_S, propagate=False)
        assert isinstance(ends.pop(2), Reject)
        assert ends == [1, 2, 1]
        wait_until_nothing_is_left(jobs)


def test_a_job_that_is_replaced_ends_as_what_stands_for_it(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.replaced, ["a", "b"])
    with running(new_worker("a")):
        assert sent.get(timeout=END_S) == ["a a@test", "b a@test"]
        wait_until_nothing_is_left(jobs)


@pytest.mark.parametrize("name", ["double", "work"])
def test_a_poisonous_job_is_quarantined_alone_and_the_others_of_its_message_succeed(
    name: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(getattr(jobs, name), ["a", "b", POISON, "c", "d"])
    with running(new_worker("a", slots=3)):
        ends = sent.get(timeout=END_S, propagate=False)
        assert isinstance(ends.pop(2), QuarantinedError)
        assert [end[0] for end in ends] == list("abcd")
        kept = jobs.cluster.quarantine.jobs()
        assert [(job.id, len(job.crashes)) for job in kept] == [(sent.ids[2], 3)]
        starts = starts_of(jobs, list(sent))
        assert starts.pop(sent.ids[2]) == (2 if name == "double" else 3)
        assert set(starts.values()) == {1}, "what had ended was done again"
        wait_until_nothing_is_left(jobs)


def test_no_job_is_convicted_for_a_crash_in_company(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", POISON, "b"])
    with running(new_worker("a", environ={"CLUSTER_MAX_CRASH_DELIVERIES": "1"})):
        ends = sent.get(timeout=END_S, propagate=False)
        assert isinstance(ends[1], QuarantinedError)
        assert [ends[0], ends[2]] == ["aa", "bb"]


def test_what_a_node_had_ended_of_a_message_is_not_done_again_by_the_next(jobs: Batches, new_worker: NewWorker) -> None:
    doomed = new_worker("a", slots=1).start().wait_ready()
    sent = jobs.cluster.submit(jobs.work, [("a",), ("b",), ("c", 10.0), ("d",), ("e",)])
    wait_until(lambda: jobs.cluster.client.exists(f"test:started:{sent.ids[2]}"), END_S, "the third begins")
    doomed.kill()
    with running(new_worker("b")):
        ends = sent.get(timeout=END_S)
        assert ends == ["a a@test", "b a@test", "c b@test", "d b@test", "e b@test"]
        starts = starts_of(jobs, list(sent))
        assert [starts[job_id] for job_id in sent.ids] == [1, 1, 2, 1, 1]
        wait_until_nothing_is_left(jobs)


def test_a_job_that_is_revoked_before_it_runs_ends_so_and_the_others_do_not(
    jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "b", "c"])
    jobs.app.control.revoke(sent.ids[1])
    with running(new_worker("a")):
        ends = sent.get(timeout=END_S, propagate=False)
        assert isinstance(ends[1], TaskRevokedError)
        assert [ends[0], ends[2]] == ["aa", "cc"]
        wait_until_nothing_is_left(jobs)


def test_jobs_that_have_expired_are_not_run(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.work, ["a", "b"], expires=0.01)
    with running(new_worker("a")):
        ends = sent.get(timeout=END_S, propagate=False)
        assert [str(end) for end in ends] == ["expired", "expired"]
        assert not any(starts_of(jobs, list(sent)).values())
        wait_until_nothing_is_left(jobs)


def test_jobs_can_be_submitted_for_later(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "b"], countdown=1.0, priority=3)
    assert len(jobs.cluster.delayed()) == 1
    with running(new_worker("a")):
        assert sent.get(timeout=END_S) == ["aa", "bb"]


def test_what_one_node_would_be_long_at_is_shared_by_all(jobs: Batches, new_worker: NewWorker) -> None:
    # Nobody is there yet, so that all of it is one message.
    sent = jobs.cluster.submit(jobs.slow, [0.4] * 20)
    assert messages(jobs) == 1
    with running(new_worker("a", slots=1), new_worker("b", slots=1)):
        nodes = sent.get(timeout=END_S)
        assert set(nodes) == {"a@test", "b@test"}
        assert set(starts_of(jobs, list(sent)).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_messages_are_as_many_as_nodes_have_slots(jobs: Batches, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=2), new_worker("b", slots=2)):
        wait_until(lambda: len(jobs.cluster.nodes()) == 2, END_S, "both are seen")
        wait_until(lambda: len(jobs.cluster.view.nodes()) == 2, END_S, "both are seen by producers")
        sent = jobs.cluster.submit(jobs.double, [("a", 1.0)] * 40)
        assert set(sent.get(timeout=END_S)) == {"aa"}
        assert calls_together(jobs) == [10] * 4


@pytest.mark.parametrize("word", ["endless", "breaks all"])
def test_the_soft_time_limit_of_the_node_is_that_of_each(word: str, jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.triple, [(word, 0, 600.0), ("endless", 0, 600.0), "a"])
    with running(new_worker("a", options=("--soft-time-limit", "3"))):
        said = told(sent.get(timeout=END_S, propagate=False))
        assert said[1].startswith("SoftTimeLimitExceeded")
        assert said[2] == "aaa"


def test_a_time_limit_of_the_node_that_jobs_exceed_together_is_that_of_each(
    jobs: Batches, new_worker: NewWorker
) -> None:
    sent = jobs.cluster.submit(jobs.slow, [0.1, 60.0, 0.1])
    with running(new_worker("a", options=("--time-limit", "3"))):
        ends = sent.get(timeout=END_S, propagate=False)
        assert isinstance(ends[1], TimeLimitExceeded)
        assert [ends[0], ends[2]] == ["a@test", "a@test"]
        wait_until_nothing_is_left(jobs)


def test_a_task_with_a_time_limit_of_its_own_is_sent_job_by_job(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.brief, [0.0, 0.0, 0.0])
    assert messages(jobs) == 3
    with running(new_worker("a")):
        assert sent.get(timeout=END_S) == ["a@test"] * 3


def test_nothing_is_sent_if_one_cannot_be_right(jobs: Batches) -> None:
    with pytest.raises(InvalidArguments, match=r"job 1: batches\.work"):
        jobs.cluster.submit(jobs.work, ["a", {"sentence": "b"}])
    assert messages(jobs) == 0


def test_what_is_too_large_together_is_sent_in_smaller_messages(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_MAX_MESSAGE_BYTES", "20000")
    jobs = make_batches()
    sent = jobs.cluster.submit(jobs.work, ["x" * 1_000] * 100)
    assert len(set(sent.ids)) == 100
    assert 5 < messages(jobs) < 100
    with pytest.raises(PartlySubmitted, match=r"1 of 3 jobs were sent, then: PayloadTooLarge") as caught:
        jobs.cluster.submit(jobs.work, ["a", "x" * 30_000, "b"])
    assert len(caught.value.results) == 1
    jobs.app.close()


def test_who_submits_while_redis_goes_away_has_the_results_of_what_was_sent(
    jobs: Batches, redis_server: RedisServer
) -> None:
    jobs.app.conf.task_publish_retry = False
    jobs.cluster.submit(jobs.work, ["warm"])
    limit = redis_server_memory(jobs)
    jobs.cluster.client.config_set("maxmemory", limit + 2_000_000)
    jobs.cluster.client.config_set("maxmemory-policy", "noeviction")
    try:
        with pytest.raises(PartlySubmitted) as caught:
            jobs.cluster.submit(jobs.work, ["x" * 100_000] * 200)
    finally:
        jobs.cluster.client.config_set("maxmemory", 0)
    assert 0 < len(caught.value.results) < 200
    assert str(len(caught.value.results)) in str(caught.value)


def redis_server_memory(jobs: Batches) -> int:
    return int(jobs.cluster.client.info("memory")["used_memory"])


def test_waiting_ends_in_time(jobs: Batches) -> None:
    sent = jobs.cluster.submit(jobs.work, ["a", "b"])
    assert not sent.ready()
    with pytest.raises(NotInTime, match="2 of 2 jobs have not ended"):
        sent.get(timeout=0.1)


def test_results_that_nobody_wants_are_not_stored(jobs: Batches, new_worker: NewWorker) -> None:
    sent = jobs.cluster.submit(jobs.double, ["a", "b"], ignore_result=True)
    with running(new_worker("a")):
        assert sent.get() == [None, None]
        wait_until(lambda: calls_together(jobs) == [2], END_S, "they are done")
        wait_until_nothing_is_left(jobs)
        stored = [text(key) for key in jobs.cluster.client.scan_iter("celery-task-meta-*")]
        assert not stored


def test_all_jobs_of_a_message_fail_if_no_node_knows_their_task(
    jobs: Batches, redis_server: RedisServer, tmp_path: Path
) -> None:
    sent = jobs.cluster.submit(jobs.work, ["a", "b"])
    with running(WorkerProcess("a", redis_server.url, tmp_path)):
        ends = sent.get(timeout=END_S, propagate=False)
        assert [type(end) for end in ends] == [NotRegistered] * 2
        wait_until_nothing_is_left(jobs)
