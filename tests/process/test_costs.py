"""What a job costs Redis, counted and not timed: whoever adds a command, a round trip or bytes to it changes these.

A figure that falls is changed here as well; one that rises has a reason that is worth it, or is a regression.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest
import redis

from cluster_tasks.broker.channel import BELL_WAIT_S, GLANCE_EVERY_S, IDLE_WAIT_S
from cluster_tasks.failover.watchers import SEATS
from cluster_tasks.model import Capacity, Node
from tests.monitored import Command, Monitor, monitored
from tests.process.batching import make_batches
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import NEVER_LOST, running
from tests.waiting import wait_until
from workers.agent import ASK_EVERY_S
from workers.redis_server import RedisServer

NODE = "n1@test"
JOBS = 100
END_S = 120.0
"""Of a machine that does other work."""
PUBLISH = Counter(GET=1, HEXISTS=1, SISMEMBER=1, HGET=3, ZSCORE=1, ZCARD=1, ZRANGE=1, LPUSH=1, ZINCRBY=1, SET=1)
FETCH = Counter(
    HDEL=1, HGET=4, ZREM=2, SISMEMBER=1, TIME=2, ZRANGEBYSCORE=1, ZRANGE=1, ZSCORE=5, RPOP=1, GET=1, HSET=1, ZINCRBY=1,
    SET=1,
)  # fmt: skip
LAST_OF_A_LIST = Counter(ZREM=1)
COMMIT = Counter(GET=1, HEXISTS=1, SET=1, EXPIRE=1, DEL=2, HDEL=1)
RESULT = Counter(SET=1, PUBLISH=1)
"""Beside those of the commit."""
PUBLISH_BYTES = 1400
"""On the wire, without the name of the host."""
FETCH_BYTES, COMMIT_BYTES, RESULT_BYTES = 800, 540, 173
OTHERS_PER_S = 60
"""What a node and a producer send by the clock, and not for a job, is less of each command."""
BY_THE_CLOCK = ("broker.let_go", "MGET")
"""Lets go of what no fetch has yet; looks whether others were given what is held."""
IDLE_BEATS, IDLE_ASKS_PER_S = 12, 5
FEW = 5
"""Of commands that a connection has for itself, such as a PING or a script that it loads."""


@pytest.fixture
def monitor(redis_server: RedisServer) -> Iterator[Monitor]:
    with monitored(redis_server.url) as made:
        yield made


def of_jobs(commands: Collection[Command], *marks: str) -> list[Command]:
    """Those that say one of the marks anywhere."""
    return [command for command in commands if any(command.mentions(mark) for mark in marks)]


def names(commands: Collection[Command]) -> Counter[str]:
    return Counter(command.name for command in commands)


def but_by_the_clock(commands: Sequence[Command]) -> Counter[str]:
    """The names without those of what a heartbeat does for the jobs that are held just then, at most once a second.

    A reader of results whose connection was late asks once for what it may have missed.
    """
    counted = names(commands)
    lasted_s = commands[-1].at_s - commands[0].at_s
    assert all(counted.pop(name, 0) <= 2 + lasted_s for name in BY_THE_CLOCK)
    return counted


@pytest.mark.parametrize("wanted", [True, False], ids=["result", "no result"])
def test_to_publish_a_job_is_one_script(jobs: Jobs, monitor: Monitor, wanted: bool) -> None:
    epoch = jobs.cluster.epochs.open(NODE, {"llm"})
    assert isinstance(epoch, str)
    capacity = Capacity(max_connections=2, max_threads=2)
    jobs.cluster.registry.register(Node(id=NODE, epoch=epoch, capacity=capacity, serves=frozenset({"llm"})))
    jobs.verbatim.apply_async((0,), ignore_result=not wanted)
    monitor.commands()
    sent = [jobs.verbatim.apply_async((1,), ignore_result=not wanted) for _ in range(JOBS)]
    seen = of_jobs(monitor.commands(), *(result.id for result in sent))
    # Nobody waits for the answer to SUBSCRIBE.
    assert names(seen) == Counter({"broker.publish": JOBS}) + Counter(SUBSCRIBE=JOBS * wanted)
    for command in seen:
        if command.name == "broker.publish":
            assert Counter(command.inside) == PUBLISH
            message = json.loads(command.words[-1])
            assert message["properties"]["delivery_info"]["routing_key"] == f"node.{NODE}"
            # Its number grows with what this process has published before; it follows eight keys and the bells.
            number, origin = command.words[3 + 8 + 1], message["headers"]["origin"]
            assert command.size - len(number) - len(origin) <= PUBLISH_BYTES


def test_what_is_published_to_all_needs_no_client_of_its_own(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    # An event of a node is published in the same way.
    jobs.app.control.broadcast("enable_events")
    made, built = redis.Redis.__init__, list[redis.Redis]()

    def count(client: redis.Redis, *args: Any, **options: Any) -> None:
        built.append(client)
        made(client, *args, **options)

    monkeypatch.setattr(redis.Redis, "__init__", count)
    for _ in range(JOBS):
        jobs.app.control.broadcast("enable_events")
    assert not built


@pytest.mark.parametrize("wanted", [True, False], ids=["result", "no result"])
@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_to_run_a_job_is_one_script_that_fetches_and_one_that_commits(
    jobs: Jobs, monitor: Monitor, new_worker: NewWorker, pool: str, wanted: bool
) -> None:
    sent = [jobs.verbatim.apply_async((1,), ignore_result=not wanted) for _ in range(JOBS)]
    ids, seen = [result.id for result in sent], list[Command]()

    def have_all_ended() -> bool:
        seen.extend(monitor.commands())
        return names(seen)["broker.commit"] == JOBS

    with running(new_worker("n1", pool=pool, slots=1, environ=NEVER_LOST)):
        wait_until(have_all_ended, END_S, "all jobs have ended")
    ends = [place for place, command in enumerate(seen) if command.name == "broker.commit"]
    # From the end of the first to that of the last nothing but these jobs is done here.
    window = seen[ends[0] + 1 : ends[-1] + 1]
    fetch = next(command for command in window if command.name == "broker.fetch")
    epoch = next(word for word in fetch.words if b":unacked:" in word).decode().rpartition("/")[2]
    for_them = of_jobs(window, *ids, f"{epoch}.")
    assert but_by_the_clock(for_them) == {"broker.fetch": JOBS - 1, "broker.commit": JOBS - 1}
    lasted_s = window[-1].at_s - window[0].at_s
    # Whatever else a job would cost would cross the wires by which it is fetched and committed.
    wires = {command.client for command in for_them if command.name in ("broker.fetch", "broker.commit")}
    beside = names([command for command in window if command.client in wires]) - names(for_them)
    assert beside.pop("broker.glance", 0) <= 1 + lasted_s / GLANCE_EVERY_S
    assert beside.total() <= FEW, beside
    others = names(window) - names(for_them)
    # Of the results of an earlier test, by this process.
    others.pop("UNSUBSCRIBE", None)
    assert max(others.values(), default=0) <= JOBS / 2 + OTHERS_PER_S * lasted_s, others
    for command in for_them:
        inside = Counter(command.inside)
        if command.name == "broker.commit":
            assert inside == COMMIT + (RESULT if wanted else Counter())
            assert command.size <= COMMIT_BYTES + RESULT_BYTES * wanted
        elif command.name == "broker.fetch":
            assert inside <= FETCH + LAST_OF_A_LIST
            assert command.size <= FETCH_BYTES


def test_of_a_job_two_keys_are_left_that_expire_and_to_read_its_result_is_one_command(
    jobs: Jobs, monitor: Monitor, new_worker: NewWorker
) -> None:
    with running(new_worker("n1", pool="solo", slots=1, environ=NEVER_LOST)):
        assert jobs.verbatim.delay(0).get(timeout=END_S) == 0
        monitor.commands()
        result = jobs.verbatim.delay(1)
        assert result.get(timeout=END_S) == 1
        seen = list[Command]()

        def is_acknowledged() -> bool:
            seen.extend(of_jobs(monitor.commands(), result.id))
            return any(command.name in {"broker.fetch", "broker.let_go"} for command in seen)

        wait_until(is_acknowledged, END_S, "a fetch, or a beat of the heart, has carried the acknowledgement")
    counted = but_by_the_clock(seen)
    assert counted.pop("broker.fetch", 0) <= 1
    assert counted == {"SUBSCRIBE": 1, "broker.publish": 1, "broker.commit": 1, "GET": 1, "UNSUBSCRIBE": 1}
    client = jobs.cluster.client
    left = sorted(key.decode() for key in client.scan_iter(f"*{result.id}*"))
    assert left == [f"celery-task-meta-{result.id}", f"cluster:terminal:{result.id}"]
    assert all(client.ttl(key) > 0 for key in left)


def test_an_idle_node_beats_and_asks_for_nothing_else_that_it_is_not_told(
    jobs: Jobs, monitor: Monitor, new_worker: NewWorker
) -> None:
    keys, client = jobs.cluster.keys, jobs.cluster.client

    def have_others_observe() -> None:
        client.zadd(keys.watchers, {f"other{number}": (time.time() + 50) * 1000 for number in range(SEATS)})

    have_others_observe()
    with running(new_worker("n1", pool="prefork", slots=1, environ=NEVER_LOST)):
        wait_until(lambda: client.zscore(keys.idle, f"node.{NODE}") is not None, END_S, "it idles")
        seen = list[Command]()

        def has_asked_for_its_share() -> bool:
            seen.extend(monitor.commands())
            return any(command.name == "HGETALL" and command.mentions(keys.nodes) for command in seen)

        def have_come(number: int) -> bool:
            seen.extend(monitor.commands())
            return names(seen)["broker.beat"] >= number

        # The last of what it does once, and not before the registry has it.
        wait_until(has_asked_for_its_share, END_S, "it has asked for its share of what waits")
        seen.clear()
        wait_until(lambda: have_come(3), END_S, "it beats")
        have_others_observe()
        seen.clear()
        wait_until(lambda: have_come(IDLE_BEATS), END_S, "it beats on")
    own, lasted_s = names(seen), seen[-1].at_s - seen[0].at_s
    listening = [command for command in seen if command.name == "PING" and command.mentions("redis-py-health-check")]
    assert len(listening) <= 2 + lasted_s
    assert own["broker.beat"] <= 1 + lasted_s
    assert own["broker.fetch"] <= 2 + lasted_s / IDLE_WAIT_S
    assert own["BRPOP"] <= 2 + lasted_s / BELL_WAIT_S + own["broker.fetch"]
    assert own["registry.beat"] <= 2 + lasted_s
    assert own["broker.watch"] <= 1 + lasted_s / ASK_EVERY_S
    assert own["SMEMBERS"] <= 1
    asks = own.total() - own["PING"]
    assert asks <= IDLE_ASKS_PER_S * lasted_s + 20, own


def test_256_jobs_that_are_submitted_together_are_published_in_one_script_and_ended_in_two(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, monitor: Monitor, new_worker: NewWorker
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    batches = make_batches()
    with running(new_worker("n1", pool="solo", slots=1, app="tests.process.batching", environ=NEVER_LOST)):
        batches.cluster.submit(batches.double, [("x",)] * 2).get(timeout=END_S)
        monitor.commands()
        sent = batches.cluster.submit(batches.double, [("x",)] * 256)
        ids, seen = [result.id for result in sent], list[Command]()

        def have_all_ended() -> bool:
            seen.extend(of_jobs(monitor.commands(), *ids))
            # The last lets go of the message.
            return any("HDEL" in command.inside for command in seen)

        wait_until(have_all_ended, END_S, "they have ended")
    batches.app.close()
    assert but_by_the_clock(seen) == {"broker.publish": 1, "ZMSCORE": 1, "broker.commit_members": 2}
    bytes_a_job = sum(command.size for command in seen if command.name not in BY_THE_CLOCK) / len(ids)
    assert bytes_a_job <= 650


def test_jobs_that_a_batch_brings_along_share_a_fetch(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, monitor: Monitor, new_worker: NewWorker
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    batches = make_batches()
    sent = [batches.triple.delay("x") for _ in range(64)]
    monitor.commands()
    with running(new_worker("n1", pool="solo", slots=1, app="tests.process.batching", environ=NEVER_LOST)):
        assert {result.get(timeout=END_S) for result in sent} == {"xxx"}
        seen = monitor.commands()
    batches.app.close()
    counted = names(of_jobs(seen, *(result.id for result in sent)))
    assert counted["broker.commit"] == 64
    # Eight in a batch; the acknowledgements of the last go with a fetch of their own.
    assert counted["broker.fetch"] <= 8 + 1
