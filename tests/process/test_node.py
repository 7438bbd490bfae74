"""The life of a node, seen from outside: join, work, drain, die, come back."""

from __future__ import annotations

import signal

import psutil
import pytest

from cluster_tasks import NodeStatus
from tests.process.accounts import (
    END_S,
    finish,
    held_key,
    let_each_be_followed,
    let_go,
    started_by,
    starts_of,
    wait_until_nothing_is_left,
)  # fmt: skip
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import ONLY_WHEN_RUNG, running
from tests.waiting import wait_until
from workers.redis_server import RedisServer


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_is_a_node_for_its_jobs_and_a_worker_for_all_others(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a", pool=pool)):
        # It may have joined before the registry answered, and then says so with its next report.
        (node,) = wait_until(lambda: [n for n in jobs.cluster.nodes() if n.status is NodeStatus.ONLINE], END_S)
        assert (node.id, node.serves) == ("a@test", {"llm"})
        assert node.capacity.max_connections == (1 if pool == "solo" else 2)
        results = [jobs.work.delay() for _ in range(20)]
        assert finish(results) == {"a@test": 20}
        assert jobs.plain.delay(1).get(timeout=END_S) == 2
        assert set(starts_of(jobs, results).values()) == {1}
        wait_until_nothing_is_left(jobs)


def test_nobody_idles_while_a_peer_queues(jobs: Jobs, new_worker: NewWorker) -> None:
    # By where they are placed all 24 would run on one node, one pair after the other.
    with running(*(new_worker(name, **ONLY_WHEN_RUNG) for name in "abc")) as nodes:
        results = [jobs.patient.apply_async(queue="node.a@test") for _ in range(24)]
        let_each_be_followed(jobs, results, [node.id for node in nodes], slots=2)
        # Six slots, 24 jobs: four rounds.
        assert set(finish(results).values()) == {8}


def test_a_killed_nodes_jobs_are_done_by_the_others(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(*(new_worker(name) for name in "abc")) as (victim, *_):
        results = [jobs.work.delay(0.5, key=str(number)) for number in range(40)]
        wait_until(lambda: jobs.cluster.client.hlen(held_key(jobs, victim.id)), END_S, "the victim works")
        victim.kill()
        by_node = finish(results)
        assert sum(by_node.values()) == 40
        kinds = [event.kind for event in jobs.cluster.events.latest()]
        assert kinds.count("node lost") == 1
        # It is told when they are in new hands, and those may be quick.
        wait_until(lambda: "jobs moved" in [event.kind for event in jobs.cluster.events.latest()], END_S)
        wait_until(lambda: victim.id not in {node.id for node in jobs.cluster.nodes()}, END_S, "the registry knows it")
        wait_until_nothing_is_left(jobs)
        # Only what the victim held can have begun twice.
        assert sum(starts_of(jobs, results).values()) <= 40 + 2


def test_the_last_nodes_jobs_wait_for_the_first_that_joins(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")) as (last,):
        results = [jobs.patient.delay() for _ in range(10)]
        wait_until(lambda: started_by(jobs, results, last.id) == 2, END_S, "it works")
        last.kill()
    more = [jobs.patient.delay() for _ in range(5)]
    with running(new_worker("b")) as (first,):
        # A process of the dead node may be at work still, and does not end its job before the fence.
        wait_until(lambda: started_by(jobs, results + more, first.id) == 2, END_S, "the other works")
        let_go(jobs.cluster.client, *results, *more)
        assert finish(results + more) == {"b@test": 15}


def test_sigterm_hands_over_the_list_and_finishes_what_runs(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a"), new_worker("b")) as (leaving, _):
        results = [jobs.work.delay(0.5, key=str(number)) for number in range(30)]
        wait_until(lambda: jobs.cluster.client.hlen(held_key(jobs, leaving.id)), END_S, "it works")
        assert leaving.stop() == 0
        assert [node.id for node in jobs.cluster.nodes()] == ["b@test"]
        assert sum(finish(results).values()) == 30
        assert set(starts_of(jobs, results).values()) == {1}, "a drained node's jobs ran once"
        assert "node lost" not in [event.kind for event in jobs.cluster.events.latest()]


def test_a_drained_node_takes_nothing_until_it_is_resumed(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a"), new_worker("b")):
        jobs.cluster.drain("a@test")
        assert finish([jobs.work.delay(0.05, key=str(number)) for number in range(20)]) == {"b@test": 20}
        wait_until(
            lambda: {node.id: node.status for node in jobs.cluster.nodes()}["a@test"] is NodeStatus.DRAINING,
            message="its own report says so, too",
        )
        jobs.cluster.resume("a@test")
        jobs.cluster.drain("b@test")
        assert finish([jobs.work.delay(0.05, key=str(number)) for number in range(20)]) == {"a@test": 20}


def test_a_name_that_is_alive_is_refused(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        second = new_worker("a").start()
        try:
            wait_until(lambda: second.exit_code() is not None, END_S, "the second gives up")
            assert second.exit_code() != 0
            assert "a node 'a@test' is alive" in second.read_log()
            assert jobs.work.delay().get(timeout=END_S) == "a@test"
        finally:
            second.stop()


def test_a_node_that_was_killed_comes_back_under_its_name(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")) as (worker,):
        worker.kill()
    with running(new_worker("a")):
        assert jobs.work.delay().get(timeout=END_S) == "a@test"


def test_a_node_that_slept_too_long_joins_anew_and_commits_nothing_old(jobs: Jobs, new_worker: NewWorker) -> None:
    abandons = {"CLUSTER_ON_FENCED": "abandon"}
    with running(new_worker("a", environ=abandons), new_worker("b")) as (sleeper, _):
        results = [jobs.patient.delay(key=str(number)) for number in range(4)]
        wait_until(lambda: started_by(jobs, results, sleeper.id) == 2, END_S, "it works")
        epoch = jobs.cluster.epochs.beats()[sleeper.id].epoch
        sleeper.signal(signal.SIGSTOP)
        wait_until(lambda: sleeper.id not in jobs.cluster.epochs.beats(), END_S, "it is fenced")
        # Its children go on and end their jobs, which nobody may commit any more.
        let_go(jobs.cluster.client, *results)
        sleeper.signal(signal.SIGCONT)
        wait_until(lambda: jobs.cluster.epochs.beats().get(sleeper.id), END_S, "it joins anew")
        assert jobs.cluster.epochs.beats()[sleeper.id].epoch != epoch
        assert sum(finish(results).values()) == 4
        counters = jobs.cluster.keys.counters
        wait_until(
            lambda: int(jobs.cluster.client.hget(counters, "stale_commits") or 0) >= 2, END_S,
            "what its children had done is refused",
        )  # fmt: skip
        wait_until_nothing_is_left(jobs)


def test_a_retry_is_balanced_anew(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a"), new_worker("b")):
        tried = [jobs.flaky.delay(2).get(timeout=END_S).split(",") for _ in range(10)]
        assert {len(nodes) for nodes in tried} == {3}
        assert any(len(set(nodes)) == 2 for nodes in tried), "no retry ever met another node"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_nodes_work_on_after_an_outage_of_redis(
    pool: str, jobs: Jobs, new_worker: NewWorker, redis_server: RedisServer
) -> None:
    with running(new_worker("a", pool=pool)) as (worker,):
        assert jobs.work.delay().get(timeout=END_S) == worker.id
        # Without persistence it comes back empty: the node has to join anew.
        redis_server.stop()
        redis_server.start()
        wait_until(lambda: jobs.cluster.epochs.beats().get(worker.id), END_S, "it joins anew")
        assert jobs.work.delay().get(timeout=END_S) == worker.id
        assert worker.exit_code() is None


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_jobs_of_a_fetch_whose_reply_was_lost_are_done_though_they_fill_all_slots(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    with running(new_worker("a", pool=pool)):
        epoch = jobs.cluster.epochs.beats()["a@test"].epoch
        jobs.cluster.drain("a@test")
        results = [jobs.work.delay() for _ in range(1 if pool == "solo" else 2)]
        # As the script leaves them: recorded as held, and nobody has read so.
        for number, _ in enumerate(results, start=1):
            client.hset(keys.unacked("a@test", epoch), f"{epoch}.9999.{number}", client.rpop("waiting.llm"))
        client.delete(keys.backlog)
        jobs.cluster.resume("a@test")
        client.client_kill_filter(_type="normal", skipme=True)
        assert finish(results) == {"a@test": len(results)}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_job_that_holds_the_gil_past_the_lease_is_not_taken_for_a_death(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a", pool=pool), new_worker("b")):
        jobs.cluster.drain("b@test")
        hog = jobs.hog.delay(8)
        wait_until(lambda: jobs.cluster.client.llen(f"test:started:{hog.id}"), END_S, "it runs")
        jobs.cluster.resume("b@test")
        assert hog.get(timeout=END_S) == "a@test"
        assert starts_of(jobs, [hog]) == {hog.id: 1}
        assert "node lost" not in [event.kind for event in jobs.cluster.events.latest()]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_the_process_that_beats_beside_a_node_is_replaced_when_it_dies(
    pool: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    def is_connected(child: psutil.Process) -> bool:
        try:
            return "workers.heartbeat" in child.cmdline() and bool(child.net_connections("tcp"))
        except psutil.Error:  # It has ended.
            return False

    def beating() -> list[psutil.Process]:
        return list(filter(is_connected, psutil.Process(worker.pid).children()))

    def beats() -> int:
        return jobs.cluster.epochs.beats()[worker.id].counter

    with running(new_worker("a", pool=pool, environ={"CLUSTER_HEARTBEAT_S": "0.25"})) as (worker,):
        (first,) = wait_until(beating, END_S, "it is connected to Redis")
        first.kill()
        (second,) = wait_until(lambda: [each for each in beating() if each != first], END_S, "there is another")
        hog = jobs.hog.delay(8)
        wait_until(lambda: started_by(jobs, [hog], worker.id), END_S, "no thread of the node runs")
        before = beats()
        wait_until(lambda: beats() >= before + 4 or hog.ready(), END_S)
        assert not hog.ready(), "nobody has beaten for it"
        assert hog.get(timeout=END_S) == worker.id
        assert second.is_running()
