"""Jobs that were sent one by one and wait together, on real nodes: done in one call, each with an end of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import chain, chord
from celery.exceptions import TaskRevokedError

from cluster_tasks.errors import QuarantinedError
from tests.process.accounts import END_S, starts_of, wait_until_nothing_is_left
from tests.process.batching import BAD, POISON, Batches, make_batches
from tests.process.nodes import NEVER_LOST, WorkerProcess, running
from tests.process.test_submit import NewWorker, told
from tests.servers import standing_still
from tests.waiting import wait_until
from workers.redis_server import RedisServer

POOLS = pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batches]:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_batches()
    yield made
    made.app.close()


@pytest.fixture
def new_worker(redis_server: RedisServer, tmp_path: Path) -> NewWorker:
    return lambda name, **options: WorkerProcess(
        name, redis_server.url, tmp_path, app="tests.process.batching", **{"slots": 1, "environ": NEVER_LOST, **options}
    )


def calls(jobs: Batches) -> list[list[str]]:
    """The words of each call that did several jobs together."""
    listed: Any = jobs.cluster.client.lrange("test:together", 0, -1)
    return [each.decode().split(",") for each in listed]


def send(task: Any, words: Sequence[str], **options: Any) -> list[Any]:
    return [task.apply_async((word,), **options) for word in words]


def ends(sent: Sequence[Any]) -> list[str]:
    return told([result.get(timeout=END_S, propagate=False) for result in sent])


@POOLS
def test_jobs_that_wait_are_done_in_one_call_and_one_that_fails_fails_alone(
    pool: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = send(jobs.triple, ["a", "b", BAD, "c"])
    with running(new_worker("a", pool=pool)):
        assert ends(sent) == ["aaa", "bbb", f"ValueError: {BAD}", "ccc"]
        assert calls(jobs) == [["a", "b", BAD, "c"]]
        assert set(starts_of(jobs, sent).values()) == {0}
        wait_until_nothing_is_left(jobs)
        assert jobs.cluster.stale_commits() == 0


def test_no_more_are_done_at_once_than_the_task_says_and_only_its_own(jobs: Batches, new_worker: NewWorker) -> None:
    sent = [*send(jobs.triple, "abcdefghij"), *send(jobs.work, "k"), *send(jobs.triple, "lm")]
    with running(new_worker("a")):
        assert [end[0] for end in ends(sent)] == list("abcdefghijklm")
        assert calls(jobs) == [list("abcdefgh"), list("ij"), list("lm")]


def test_what_waits_is_shared_between_the_free_places_of_a_node(jobs: Batches, new_worker: NewWorker) -> None:
    sent = send(jobs.triple, "abcdef")
    with running(new_worker("a", pool="threads", slots=2)):
        ends(sent)
        assert sorted(map(len, calls(jobs))) == [3, 3]


def test_a_node_that_may_wait_does_jobs_together_that_come_one_by_one(jobs: Batches, new_worker: NewWorker) -> None:
    with running(new_worker("a", pool="threads", slots=4)):
        sent = send(jobs.patient, "abcdabcdabcd")
        assert ends(sent) == ["aaa", "bbb", "ccc", "ddd"] * 3
        # A machine that is late may give it some of them a second after the first.
        assert sum(starts_of(jobs, sent).values()) < 4


@POOLS
def test_if_the_call_fails_each_is_done_by_itself(pool: str, jobs: Batches, new_worker: NewWorker) -> None:
    sent = send(jobs.triple, ["a", "breaks all", "b"])
    with running(new_worker("a", pool=pool)):
        assert ends(sent) == ["aaa", "RuntimeError: this one cannot be done", "bbb"]
        assert set(starts_of(jobs, sent).values()) == {1}


def test_wrong_arguments_and_results_that_cannot_be_stored_are_the_failure_of_their_job(
    jobs: Batches, new_worker: NewWorker
) -> None:
    wrong = jobs.app.send_task("batches.triple", ("a", 0, 0.0, "too many"), task_type=jobs.triple)
    sent = [*send(jobs.triple, ["a", "unsayable"]), wrong, *send(jobs.triple, ["b"])]
    with running(new_worker("a")):
        said = ends(sent)
        assert [said[0], said[3]] == ["aaa", "bbb"]
        assert "EncodeError" in said[1]
        assert said[2].startswith("TypeError")


@POOLS
def test_a_job_that_is_tried_again_fails_no_other(pool: str, jobs: Batches, new_worker: NewWorker) -> None:
    sent = send(jobs.triple, ["a", "later", "b"])
    with running(new_worker("a", pool=pool)):
        assert ends(sent) == ["aaa", "laterlaterlater", "bbb"]
        assert +starts_of(jobs, sent) == {sent[1].id: 1}
        wait_until_nothing_is_left(jobs)


def test_what_follows_a_job_follows_it_here_too(jobs: Batches, new_worker: NewWorker) -> None:
    chained = chain(jobs.triple.s("a"), jobs.triple.s()).apply_async()
    parts = chord([jobs.triple.s(word) for word in "bcd"], jobs.app.signature("batches.joined")).apply_async()
    linked = jobs.triple.apply_async(("e",), link=jobs.triple.s())
    with running(new_worker("a")):
        assert chained.get(timeout=END_S) == "a" * 9
        assert parts.get(timeout=END_S) == "bbbcccddd"
        assert linked.get(timeout=END_S) == "eee"
        wait_until(lambda: linked.children and linked.children[0].ready(), END_S, "what is linked follows")
        wait_until_nothing_is_left(jobs)
    assert max(map(len, calls(jobs))) > 1


@POOLS
def test_revoked_and_expired_jobs_end_so_and_the_others_are_done(
    pool: str, jobs: Batches, new_worker: NewWorker
) -> None:
    sent = send(jobs.triple, "abc")
    sent.append(jobs.triple.apply_async(("late",), expires=0.001))
    sent[1].revoke()
    with running(new_worker("a", pool=pool)):
        assert [sent[0].get(timeout=END_S), sent[2].get(timeout=END_S)] == ["aaa", "ccc"]
        for revoked in (sent[1], sent[3]):
            with pytest.raises(TaskRevokedError):
                revoked.get(timeout=END_S)
        wait_until_nothing_is_left(jobs)


def test_the_death_of_the_process_convicts_only_who_kills_it_again_alone(jobs: Batches, new_worker: NewWorker) -> None:
    sent = send(jobs.triple, ["a", "b", POISON, "c", "d"])
    with running(new_worker("a")):
        said = ends(sent)
        assert [said[0], said[1], said[3], said[4]] == ["aaa", "bbb", "ccc", "ddd"]
        assert said[2].startswith(QuarantinedError.__name__)
        starts = starts_of(jobs, sent)
        assert starts.pop(sent[2].id) == 2
        assert set(starts.values()) == {1}
        assert [job.id for job in jobs.cluster.quarantine.jobs()] == [sent[2].id]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_death_of_the_node_loses_and_doubles_nothing(pool: str, jobs: Batches, new_worker: NewWorker) -> None:
    sent = [jobs.triple.apply_async((word,), {"seconds": 60.0}) for word in "abcd"]
    a = new_worker("a", pool=pool, environ={})
    with running(a):
        wait_until(lambda: calls(jobs), END_S, "it has begun")
        a.kill()
        with running(new_worker("b", pool=pool, environ={})):
            assert ends(sent) == ["aaa", "bbb", "ccc", "ddd"]
            # What was at work when a node died is done by itself.
            assert len(calls(jobs)) == 1
            assert set(starts_of(jobs, sent).values()) == {1}
            wait_until_nothing_is_left(jobs)


def test_a_batch_of_a_fenced_node_commits_nothing(jobs: Batches, new_worker: NewWorker) -> None:
    quick = {"CLUSTER_HEARTBEAT_S": "0.5", "CLUSTER_LEASE_S": "2", "CLUSTER_ON_FENCED": "abandon"}
    sent = [jobs.triple.apply_async((word,), {"seconds": 15.0}) for word in "abcd"]
    a, b = (new_worker(name, environ=quick) for name in "ab")
    with running(a):
        wait_until(lambda: calls(jobs), END_S, "it has begun")
        # Its child as well: it ends the call by itself, and must not do so before the fence.
        children = [child.pid for child in psutil.Process(a.pid).children()]
        with ExitStack() as other:
            with standing_still(a.pid, *children):
                other.enter_context(running(b))
                assert ends(sent) == ["aaa", "bbb", "ccc", "ddd"]
            wait_until(lambda: jobs.cluster.stale_commits() >= 4, END_S, "all of them are refused")
            wait_until_nothing_is_left(jobs)


def test_a_time_limit_of_the_node_is_that_of_each_job(jobs: Batches, new_worker: NewWorker) -> None:
    sent = [jobs.triple.apply_async((word,), {"seconds": 600.0}) for word in ("a", "endless", "c")]
    with running(new_worker("a", options=("--time-limit", "3"))):
        said = ends(sent)
        assert [said[0], said[2]] == ["aaa", "ccc"]
        assert said[1].startswith("TimeLimitExceeded")


def test_jobs_of_a_batch_are_told_as_any_others(jobs: Batches, new_worker: NewWorker) -> None:
    sent = send(jobs.triple, "abc")
    worker = new_worker("a")
    with running(worker):
        ends(sent)
        for what in ("received", "succeeded"):
            lines = [f"batches.triple[{result.id}] {what}" for result in sent]
            # A result is there a moment before the node says so.
            wait_until(lambda lines=lines: all(line in worker.read_log() for line in lines), message=what)
