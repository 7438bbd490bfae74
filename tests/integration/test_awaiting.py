"""Results for asyncio: a real Redis, and results that come, fail, or never come."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import EagerResult, GroupResult
from kombu.exceptions import DecodeError

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.awaiting import Awaiting
from cluster_tasks.errors import InvalidArguments
from cluster_tasks.redis_store import connect
from tests.waiting import wait_until
from workers.redis_server import RedisServer

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
WITHIN_S = 30.0


class Jobs:
    """An app whose jobs nobody runs: their results are stored by the test."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        self.app = Celery("waiting", set_as_current=False, broker=redis_url)
        self.app.conf.update(settings)
        self.cluster = Cluster(self.app)

        @self.app.task(base=ClusterTask, shared=False, name="waiting.work", request_type="llm")
        def work() -> None:
            """Is never run."""

        self.work = work

    def end(self, job: Any, value: Any = None, state: str = states.SUCCESS) -> None:
        """Store how a job has ended."""
        self.app.backend.store_result(job.id, value, state)

    def end_later(self, job: Any, value: Any = None, state: str = states.SUCCESS, after_s: float = 0.1) -> None:
        threading.Timer(after_s, self.end, (job, value, state)).start()


@pytest.fixture
def jobs(redis_url: str) -> Iterator[Jobs]:
    made = Jobs(redis_url)
    yield made
    made.app.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url) as client:
        yield client


def run(make: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(make(), WITHIN_S)

    return asyncio.run(main())


def connections(client: redis.Redis) -> set[int]:
    return {int(each["id"]) for each in client.client_list()}  # type: ignore[union-attr]


def test_a_result_is_waited_for_while_the_loop_runs_on(jobs: Jobs) -> None:
    async def main() -> tuple[Any, int]:
        job, turns = jobs.work.delay(), 0
        jobs.end_later(job, {"text": "done"}, after_s=0.3)
        waiting = asyncio.ensure_future(jobs.cluster.wait(job))
        while not waiting.done():
            turns += 1
            await asyncio.sleep(0)
        assert job.ready()
        return waiting.result(), turns

    value, turns = run(main)
    assert value == {"text": "done"}
    assert turns > 10


def test_hundreds_are_gathered_over_one_connection_and_no_thread(jobs: Jobs, client: redis.Redis) -> None:
    async def main() -> list[int]:
        sent = [jobs.work.delay() for _ in range(300)]
        before, threads = connections(client), threading.active_count()
        waiting = asyncio.gather(*(jobs.cluster.wait(job) for job in sent))
        await asyncio.sleep(0.2)
        assert len(connections(client) - before) <= 1
        assert not any(subscriptions(client)), "Celery listens for none of them"
        assert threading.active_count() <= threads
        for number, job in enumerate(sent):
            jobs.end(job, number)
        return await waiting

    assert run(main) == list(range(300))


def subscriptions(client: redis.Redis) -> list[int]:
    return [int(each["sub"]) for each in client.client_list()]  # type: ignore[union-attr]


def test_it_raises_what_get_raises(jobs: Jobs) -> None:
    async def main() -> None:
        failed, revoked, unknown = (jobs.work.delay() for _ in range(3))
        jobs.end(failed, KeyError("no such thing"), states.FAILURE)
        jobs.end_later(revoked, TaskRevokedError("not wanted"), states.REVOKED)
        for _ in range(2):
            with pytest.raises(KeyError, match="no such thing"):
                await jobs.cluster.wait(failed)
        assert isinstance(await jobs.cluster.wait(failed, propagate=False), KeyError)
        with pytest.raises(TaskRevokedError, match="not wanted"):
            await jobs.cluster.wait(revoked)
        with pytest.raises(CeleryTimeout):
            await jobs.cluster.wait(unknown, 0.1)

    run(main)


def test_what_is_no_result_is_refused(jobs: Jobs) -> None:
    async def main() -> None:
        for wrong in ("an id", None):
            with pytest.raises(InvalidArguments, match=f"not {wrong!r}"):
                await jobs.cluster.wait(wrong)

    run(main)


def test_a_job_before_it_in_the_chain_that_fails_ends_the_wait(jobs: Jobs) -> None:
    async def main() -> None:
        first, second = jobs.work.delay(), jobs.work.delay()
        second.parent = first
        jobs.end_later(first, KeyError("first"), states.FAILURE)
        with pytest.raises(KeyError, match="first"):
            await jobs.cluster.wait(second)
        third, last = jobs.work.delay(), jobs.work.delay()
        last.parent = third
        jobs.end(third, 1)
        jobs.end_later(last, 2)
        assert await jobs.cluster.wait(last) == 2

    run(main)


def test_a_group_is_waited_for_as_a_whole(jobs: Jobs) -> None:
    async def main() -> None:
        sent = [jobs.work.delay() for _ in range(3)]
        for number, job in enumerate(sent):
            jobs.end_later(job, number, after_s=0.3 - number / 10)
        assert await jobs.cluster.wait(GroupResult("group", sent)) == [0, 1, 2]
        failed = jobs.work.delay()
        jobs.end(failed, KeyError("one of them"), states.FAILURE)
        with pytest.raises(KeyError):
            await jobs.cluster.wait(GroupResult("group", [*sent, failed]))

    run(main)


def test_what_is_there_already_or_will_never_be_is_not_waited_for(jobs: Jobs) -> None:
    async def main() -> None:
        assert await jobs.cluster.wait(EagerResult("id", 7, states.SUCCESS)) == 7
        assert await jobs.cluster.wait(jobs.work.apply_async(ignore_result=True)) is None

    run(main)


def test_who_stops_waiting_leaves_the_others_waiting(jobs: Jobs, client: redis.Redis) -> None:
    async def main() -> int:
        job, never = jobs.work.delay(), jobs.work.delay()
        before = connections(client)
        one, other = (asyncio.ensure_future(jobs.cluster.wait(job)) for _ in range(2))
        (connection,) = await asyncio.to_thread(wait_until, lambda: connections(client) - before)
        one.cancel()
        jobs.end_later(job, 3)
        assert await other == 3
        with pytest.raises(asyncio.CancelledError):
            await one
        (asker,) = jobs.cluster.awaiting._askers.values()
        alone = asyncio.ensure_future(jobs.cluster.wait(never))
        await asyncio.to_thread(wait_until, lambda: asker._wanted, message="it waits")
        alone.cancel()
        await asyncio.to_thread(wait_until, lambda: not asker._wanted, message="it is let go of")
        return connection

    connection = run(main)
    wait_until(lambda: connection not in connections(client), message="the connection ends with its loop")


def test_the_connection_is_kept_for_a_while_and_made_again_later(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster_tasks.awaiting.LINGER_S", 0.1)

    async def main() -> None:
        for pause_s in (0.0, 0.3):
            await asyncio.sleep(pause_s)
            job = jobs.work.delay()
            jobs.end_later(job, 1)
            assert await jobs.cluster.wait(job) == 1

    run(main)


def test_who_begins_to_wait_while_the_connection_is_closed_is_answered(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster_tasks.awaiting.LINGER_S", 0.01)

    async def main() -> None:
        for number in range(40):
            job = jobs.work.delay()
            jobs.end(job, number)
            assert await jobs.cluster.wait(job) == number
            await asyncio.sleep(0.0095 + number % 10 / 10_000)

    run(main)


def test_each_thread_may_have_a_loop_of_its_own(jobs: Jobs) -> None:
    ended: list[Any] = []

    def work(number: int) -> None:
        async def main() -> Any:
            job = jobs.work.delay()
            jobs.end_later(job, number)
            return await jobs.cluster.wait(job)

        ended.append(asyncio.run(main()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_outage_of_redis_is_waited_out(jobs: Jobs, redis_server: RedisServer) -> None:
    async def main() -> Any:
        job = jobs.work.delay()
        waiting = asyncio.ensure_future(jobs.cluster.wait(job))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(redis_server.stop)
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await asyncio.to_thread(redis_server.start)
        with connect(redis_server.url) as again:
            again.set(jobs.app.backend.get_key_for_task(job.id), jobs.app.backend.encode(
                {"task_id": job.id, "status": states.SUCCESS, "result": 5, "traceback": None, "children": []}
            ))  # fmt: skip
        return await waiting

    assert run(main) == 5


def test_results_that_live_elsewhere_are_asked_for_in_a_thread(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    jobs = Jobs(redis_url, result_backend=f"file://{tmp_path}/results")

    async def main() -> Any:
        job = jobs.work.delay()
        jobs.end_later(job, 4)
        return await jobs.cluster.wait(job)

    assert run(main) == 4
    jobs.app.close()


def test_loops_that_are_over_are_forgotten(jobs: Jobs) -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        with pytest.raises(CeleryTimeout):
            await jobs.cluster.wait(jobs.work.delay(), 0.05)

    for _ in range(4):
        run(main)
    gc.collect()
    # The last one may be remembered until there is another.
    assert [loop() is None for loop in loops[:-1]] == [True] * 3


def test_what_cannot_be_read_is_raised_by_all_who_wait(jobs: Jobs) -> None:
    awaiting = Awaiting(jobs.app, "mymaster")

    async def main() -> None:
        job = jobs.work.delay()
        jobs.app.backend.set(jobs.app.backend.get_key_for_task(job.id), b"no result")
        for _ in range(2):
            with pytest.raises(DecodeError):
                await awaiting.wait(job)

    run(main)


def test_a_short_job_is_answered_soon_and_a_long_one_asked_for_seldom(jobs: Jobs, client: redis.Redis) -> None:
    def asked() -> int:
        return int(client.info("commandstats")["cmdstat_mget"]["calls"])  # type: ignore[index]

    async def main() -> int:
        job = jobs.work.delay()
        waiting = asyncio.ensure_future(jobs.cluster.wait(job))
        begun_s = time.monotonic()
        await asyncio.sleep(2)
        most = asked()
        waited_s = time.monotonic() - begun_s
        jobs.end(job, 1)
        assert await waiting == 1
        # Every 5 ms for 50 ms, then after a tenth of the time each.
        assert most < 60 * waited_s
        return most

    assert run(main) > 5
