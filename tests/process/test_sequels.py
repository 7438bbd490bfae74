"""What follows a job is published once, also by jobs that die while they do it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import chord

from tests.process.accounts import END_S, let_go, wait_until_nothing_is_left
from tests.process.breaking_off import BREAK_OFF, DEATHS, make_breaking_off
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until
from workers.redis_server import RedisServer

SEQUELS = ("step", "link", "errback", "body", "errback of a body", "retry")


@pytest.fixture
def jobs(redis_server: RedisServer, database: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app of breaking_off as its producers see it, with its results in some database of the broker's Redis."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_RESULT_BACKEND", f"redis://127.0.0.1:{redis_server.port}/{database}")
    made = make_breaking_off()
    yield made
    made.app.close()


def send_all(jobs: Jobs) -> None:
    """Send a job that is followed by each kind of sequel."""
    tasks = jobs.app.tasks
    fail, follow, work = tasks["jobs.fail"], tasks["jobs.follow"], jobs.work
    (work.si(0.0) | follow.s(name="step")).delay()
    work.apply_async((0.0,), link=follow.s(name="link"))
    fail.apply_async(link_error=follow.s(name="errback"))
    chord([work.s(0.0), work.s(0.0)], follow.s(name="body")).delay()
    chord([work.s(0.0), fail.s()], work.s(0.0).on_error(follow.s(name="errback of a body"))).delay()
    tasks["jobs.again"].delay(name="retry")


@pytest.mark.parametrize(("when", "database"), [("before", 1), ("after", 0)])
def test_a_sequel_comes_once_when_the_process_dies_that_publishes_it(
    when: str, jobs: Jobs, new_worker: NewWorker
) -> None:
    client = jobs.cluster.client
    client.hset(DEATHS, mapping=dict.fromkeys(SEQUELS, when))

    def came() -> dict[str, int]:
        return {name: client.llen(f"test:followed:{name}") for name in SEQUELS}

    with running(new_worker("a", app="tests.process.breaking_off", slots=3, environ=BREAK_OFF)):
        send_all(jobs)
        wait_until(lambda: [name for name, times in came().items() if not times] == [], END_S, "every sequel comes")
        wait_until_nothing_is_left(jobs)
    assert not client.exists(DEATHS), "somebody has not died as planned"
    assert came() == dict.fromkeys(SEQUELS, 1)


@pytest.mark.parametrize("database", [0])
def test_a_chord_learns_of_parts_that_are_revoked_while_they_run(jobs: Jobs, new_worker: NewWorker) -> None:
    work, again = jobs.work, jobs.app.tasks["jobs.again"]
    with running(new_worker("a", app="tests.process.breaking_off", slots=1)):
        busy = jobs.patient.delay()
        wait_until(lambda: jobs.cluster.client.llen(f"test:started:{busy.id}"), END_S)
        chords = [chord([part, work.s(0.0)], work.si(0.0)).delay() for part in (work.s(0.0), again.s(name="revoked"))]
        for result in chords:
            # What another node does when it is told to revoke a job that no node has said to be at work on.
            jobs.app.backend.mark_as_revoked(result.parent.results[0].id, "revoked")
        let_go(jobs.cluster.client, busy)
        wait_until(lambda: [result.state for result in chords] == ["FAILURE", "FAILURE"], END_S, "both chords fail")
        assert jobs.cluster.client.llen("test:tried:revoked") == 1
        wait_until_nothing_is_left(jobs)
