"""Jobs whose process or node dies while they run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import psutil
import pytest
from celery import chain

from cluster_tasks.errors import NodeLost, QuarantinedError
from tests.broker import Broker, make_members, make_message
from tests.process.accounts import END_S, finish, held_key, starts_of, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.process.poisonous import BRITTLE, DEADLY, DENSE, make_poisonous
from tests.waiting import wait_until
from workers.redis_server import RedisServer


def crashes_of(jobs: Jobs, job_id: str) -> int:
    return int(jobs.cluster.client.llen(jobs.cluster.keys.crashes(job_id)))


def test_a_child_that_dies_costs_its_own_job_a_repetition_and_no_other(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=3)):
        neighbours = [jobs.work.delay(1.0) for _ in range(6)]
        fatal = jobs.fatal.delay(2)
        assert fatal.get(timeout=END_S) == "a@test"
        assert starts_of(jobs, [fatal]) == {fatal.id: 3}
        assert sum(finish(neighbours).values()) == 6
        assert set(starts_of(jobs, neighbours).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_a_job_that_kills_its_process_is_quarantined_after_three_and_its_neighbours_finish(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a", slots=3)):
        neighbours = [jobs.work.delay(0.5) for _ in range(12)]
        follower = jobs.work.s(0.0)
        poison = chain(jobs.fatal.s(), follower).apply_async()
        with pytest.raises(QuarantinedError, match="3 processes died while it ran"):
            poison.get(timeout=END_S)
        assert starts_of(jobs, [poison.parent]) == {poison.parent.id: 3}
        assert sum(finish(neighbours).values()) == 12
        (kept,) = jobs.cluster.quarantine.jobs()
        assert (kept.id, kept.task, kept.request_type) == (poison.parent.id, "jobs.fatal", "llm")
        assert [crash.node for crash in kept.crashes] == ["a@test"] * 3
        wait_until_nothing_is_left(jobs)


def test_a_job_that_kills_its_whole_node_is_quarantined_by_the_fourth(jobs: Jobs, new_worker: NewWorker) -> None:
    # Each node is started when the one before has died, for a node that dies takes running neighbours along.
    poison = jobs.fatal.delay()
    neighbours = [jobs.work.delay(0.2) for _ in range(6)]
    for name in "abc":
        doomed = new_worker(name, pool="threads", slots=2).start()
        wait_until(lambda doomed=doomed: doomed.exit_code() is not None, END_S, "the job kills its node")
    with running(new_worker("d", pool="threads", slots=2)):
        with pytest.raises(QuarantinedError):
            poison.get(timeout=END_S)
        assert sum(finish(neighbours).values()) == 6
        assert starts_of(jobs, [poison]) == {poison.id: 3}
        assert [kept.id for kept in jobs.cluster.quarantine.jobs()] == [poison.id], "no neighbour was convicted"


@pytest.mark.parametrize("dies_in", ["the decoder", "the unpacking", "the unpacking of many", "a signal handler"])
def test_a_message_that_kills_before_it_is_run_is_quarantined_and_what_was_fetched_with_it_is_not_charged(
    dies_in: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, new_worker: NewWorker
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    jobs = make_poisonous()
    told = jobs.plain.si(1).set(task_id="told")
    if dies_in == "the decoder":
        poison = jobs.work.apply_async(kwargs={"key": DEADLY}, serializer=BRITTLE)
    elif dies_in == "the unpacking":
        poison = jobs.work.apply_async(kwargs={"key": DEADLY}, compression=DENSE)
    elif dies_in == "the unpacking of many":
        many = json.loads(make_members([DEADLY], "many", "llm"))
        many["headers"]["compression"] = DENSE
        Broker(redis_server.url).put(json.dumps(many).encode())
        poison = jobs.app.AsyncResult(DEADLY)
    else:
        poison = jobs.work.apply_async(task_id=DEADLY, link_error=told)
    message_id = "many" if dies_in == "the unpacking of many" else poison.id
    neighbours = [jobs.work.delay() for _ in range(6)]
    options: dict[str, Any] = {"app": "tests.process.poisonous", "environ": {"TEST_DIES": "1"}, "pool": "threads"}
    for name in "abc":
        doomed = new_worker(name, **options).start()
        wait_until(lambda doomed=doomed: doomed.exit_code() is not None, END_S, "the message kills its node")
        # A last beat may be under way, of the process that beats beside it.
        wait_until(
            lambda d=doomed: jobs.cluster.health.fail_over(d.id, jobs.cluster.epochs.beats()[d.id], 0), END_S
        )  # fmt: skip
    assert crashes_of(jobs, message_id) == 3
    assert not starts_of(jobs, neighbours).total()
    # One was fetched with it when nobody knew yet.
    assert sum(crashes_of(jobs, neighbour.id) for neighbour in neighbours) == 1
    with running(new_worker("d", **options)):
        with pytest.raises(QuarantinedError):
            poison.get(timeout=END_S)
        assert finish(neighbours) == {"d@test": 6}
        assert [kept.id for kept in jobs.cluster.quarantine.jobs()] == [message_id]
        if dies_in == "a signal handler":
            assert jobs.app.AsyncResult("told").get(timeout=END_S) == 2
        wait_until_nothing_is_left(jobs)
    jobs.app.close()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_job_that_exits_is_quarantined_and_takes_neither_slot_nor_node_along(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a", pool=pool)) as (worker,):
        leaving = [jobs.leave.delay() for _ in range(2)]
        neighbours = [jobs.work.delay(0.05) for _ in range(6)]
        for job in leaving:
            with pytest.raises(QuarantinedError):
                job.get(timeout=END_S)
        assert set(starts_of(jobs, leaving).values()) == {3}
        assert all(worker.read_log().count(f"[{job.id}] is charged with a crash") == 3 for job in leaving)
        assert sum(finish(neighbours).values()) == 6
        assert worker.exit_code() is None
        wait_until_nothing_is_left(jobs)


def test_a_node_runs_one_suspect_at_a_time(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=4)) as (victim,):
        results = [jobs.stubborn.delay(600, 1.5) for _ in range(4)]
        wait_until(lambda: sum(starts_of(jobs, results).values()) == 4, END_S, "all four run")
        victim.kill()
    with running(new_worker("b", slots=4)):
        keys, client = jobs.cluster.keys, jobs.cluster.client
        most = 0
        while not all(result.ready() for result in results):
            most = max(most, int(client.hlen(held_key(jobs, "b@test"))))
        assert finish(results) == {"b@test": 4}
        assert most == 1
        assert not client.exists(keys.suspect_queue("llm"))


def test_a_job_that_must_not_run_twice_fails_with_its_process(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        job = jobs.once.delay()
        with pytest.raises(NodeLost, match="it ran on a@test when that happened"):
            job.get(timeout=END_S)
        assert starts_of(jobs, [job]) == {job.id: 1}
        wait_until_nothing_is_left(jobs)


def test_what_calls_a_task_for_each_item_is_run_twice_no_more_than_that_task(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        for name, calls in [("map", jobs.once.map(["map"])), ("starmap", jobs.once.starmap([("starmap",)]))]:
            with pytest.raises(NodeLost, match="it is not to be run twice"):
                calls.delay().get(timeout=END_S)
            assert jobs.cluster.client.llen(f"test:started:{name}") == 1, name
        wait_until_nothing_is_left(jobs)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_memory_error_is_the_failure_of_its_job_alone(pool: str, jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", pool=pool)) as (worker,):
        with pytest.raises(MemoryError, match="on a@test"):
            jobs.huge.delay().get(timeout=END_S)
        assert jobs.work.delay().get(timeout=END_S) == worker.id
        assert worker.exit_code() is None
        wait_until_nothing_is_left(jobs)


def test_a_hard_time_limit_and_a_termination_are_no_crashes(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        limited = jobs.work.apply_async((60,), time_limit=3)
        ended = jobs.work.delay(60)
        wait_until(lambda: all(starts_of(jobs, [limited, ended]).values()), END_S, "both run")
        ended.revoke(terminate=True)
        for job in (limited, ended):
            with pytest.raises(Exception, match=r"TimeLimitExceeded|terminated"):
                job.get(timeout=END_S)
        assert [crashes_of(jobs, job.id) for job in (limited, ended)] == [0, 0]
        assert set(starts_of(jobs, [limited, ended]).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_what_had_not_started_is_not_charged_with_the_death_of_its_node(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a", slots=4)) as (victim,):
        results = [jobs.limited.delay() for _ in range(3)]
        keys, client = jobs.cluster.keys, jobs.cluster.client
        held_back = keys.not_started(victim.id, jobs.cluster.epochs.beats()[victim.id].epoch)
        wait_until(
            lambda: client.scard(held_back) == client.hlen(held_key(jobs, victim.id)) == 2, END_S,
            "one has run, two are held back",
        )  # fmt: skip
        victim.kill()
    with running(new_worker("b", slots=4)):
        wait_until(lambda: client.hlen(held_key(jobs, "b@test")) == 1, END_S, "one runs at once, one is held back")
        assert not any(crashes_of(jobs, result.id) for result in results)
        assert not client.exists(keys.suspect_queue("llm"))


def test_of_what_was_held_back_and_never_began_nothing_is_left(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        jobs.app.control.revoke("called back")
        wait_until(lambda: jobs.app.control.inspect().revoked() == {"a@test": ["called back"]}, END_S)
        result = jobs.limited.apply_async(task_id="called back")
        with pytest.raises(Exception, match="revoked"):
            result.get(timeout=END_S)
        wait_until_nothing_is_left(jobs)


def test_a_drained_nodes_running_job_is_given_back_uncharged(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a"), new_worker("b")) as (leaving, _):
        jobs.cluster.drain("b@test")
        job = jobs.work.delay(4)
        wait_until(lambda: starts_of(jobs, [job])[job.id], END_S, "it runs")
        jobs.cluster.resume("b@test")
        leaving.signal(signal.SIGQUIT)  # Celery's cold shutdown: it does not wait for what runs.
        assert job.get(timeout=END_S) in ("a@test", "b@test")
        assert crashes_of(jobs, job.id) == 0


def test_no_ordinary_end_of_a_job_or_a_node_is_a_crash(jobs: Jobs, new_worker: NewWorker) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    with running(new_worker("a", slots=4)) as (node,):
        limited = jobs.work.apply_async((60,), soft_time_limit=3)
        revoked, drained, long = (jobs.work.delay(seconds) for seconds in (2, 2, 60))
        wait_until(lambda: sum(starts_of(jobs, [limited, revoked, drained, long]).values()) == 4, END_S, "all run")
        jobs.cluster.drain(node.id)
        revoked.revoke()
        with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
            limited.get(timeout=END_S)
        assert drained.get(timeout=END_S) == node.id
        # As systemd does it: each process of the node is told to end.
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):  # The end of others may have ended it.
                member.terminate()
        wait_until(lambda: node.exit_code() is not None, END_S, "it ends")
        # A charge is forgotten with the end of its job, but it comes with another start.
        assert set(starts_of(jobs, [limited, revoked, drained, long]).values()) == {1}
        assert not list(client.scan_iter(keys.crashes("*")))
        assert jobs.cluster.release() == 1
        assert not list(client.scan_iter(keys.crashes("*")))
        assert client.llen("celery") == 1
        assert not jobs.cluster.quarantine.jobs()


def test_a_node_that_ends_by_an_error_of_its_own_is_a_lost_one(jobs: Jobs, new_worker: NewWorker) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    with running(new_worker("a", app="tests.process.failing"), new_worker("b")) as (failing, _):
        jobs.cluster.drain("b@test")
        job = jobs.work.delay(2)
        wait_until(lambda: starts_of(jobs, [job])[job.id], END_S, "it runs")
        # What breaks the consumer is held, and has not come to the pool.
        epoch = jobs.cluster.epochs.beats()[failing.id].epoch
        client.hset(keys.unacked(failing.id, epoch), f"{epoch}.9999.1", make_message("culprit", "llm"))
        failing.signal(signal.SIGUSR2)
        assert job.get(timeout=END_S) == failing.id
        wait_until(lambda: failing.exit_code() is not None, END_S, "it ends")
        assert failing.exit_code() != 0
        wait_until(lambda: crashes_of(jobs, "culprit"), END_S, "it is charged")
        assert starts_of(jobs, [job]) == {job.id: 1}
        assert [event.facts["node"] for event in jobs.cluster.events.latest() if event.kind == "node lost"] == [
            "a@test"
        ]


def quarantine(*words: str) -> Any:
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "quarantine", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout + done.stderr


def test_the_quarantine_is_looked_at_retried_and_dropped_from_the_command_line(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a")):
        poisons = [jobs.fatal.delay(3, "stubborn"), jobs.fatal.delay()]
        for poison in poisons:
            with pytest.raises(QuarantinedError):
                poison.get(timeout=END_S)
        code, listed = quarantine("list", "--json")
        assert (code, {kept["id"] for kept in listed}) == (0, {poison.id for poison in poisons})
        code, shown = quarantine("show", poisons[0].id, "--json")
        assert (code, shown["task"], len(shown["crashes"])) == (0, "jobs.fatal", 3)
        assert "WorkerLostError: Worker exited prematurely: signal 9" in shown["crashes"][-1]["traceback"]
        code, retried = quarantine("retry", poisons[0].id, "--json")
        assert (code, retried["retry_of"]) == (0, poisons[0].id)
        # Under its first id it has died three times, as it wanted.
        assert jobs.app.AsyncResult(retried["id"]).get(timeout=END_S) == "a@test"
        code, retried = quarantine("retry", "--task", "jobs.fatal", "--json")
        assert (code, retried["retry_of"]) == (0, poisons[1].id)
        with pytest.raises(QuarantinedError):
            jobs.app.AsyncResult(retried["id"]).get(timeout=END_S)
        (again,) = jobs.cluster.quarantine.jobs()
        assert (again.id, again.retry_of) == (retried["id"], poisons[1].id)
        assert f"in quarantine before as {poisons[1].id}" in quarantine("show", again.id)[1]
        assert quarantine("drop", "--all", "--json")[0] == 0
        assert quarantine("list", "--json") == (0, [])
        code, told = quarantine("drop", "nonsense")
        assert code == 1
        assert "no job 'nonsense' is in quarantine" in told
