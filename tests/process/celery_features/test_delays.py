"""Jobs that wait for their time, and jobs whose time is over."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import chain, states
from celery.exceptions import TaskRevokedError

from tests.process.celery_features.conftest import END_S, Gate, Jobs, jobs_on_nodes
from tests.process.nodes import running
from tests.waiting import wait_until

TOMORROW_S = 24 * 3600


@pytest.fixture(scope="module")
def jobs(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Two nodes; jobs of tomorrow are left when they stop."""
    with jobs_on_nodes(tmp_path_factory.mktemp("nodes"), "a", "b", leave_nothing=False) as jobs:
        yield jobs


def scheduled(jobs: Jobs, *node_ids: str) -> set[str]:
    """The ids that ``inspect scheduled`` shows."""
    answers = jobs.inspect(*node_ids).scheduled() or {}
    return {entry["request"]["id"] for entries in answers.values() for entry in entries}


def known_anywhere(jobs: Jobs, job_id: str) -> bool:
    """Whether a job waits for its time or is with a node."""
    return job_id in scheduled(jobs) or any((jobs.inspect().query_task(job_id) or {}).values())


def slots(jobs: Jobs) -> int:
    return sum(node.capacity.max_connections for node in jobs.cluster.nodes())


def test_a_countdown_is_the_least_that_a_job_waits(jobs: Jobs) -> None:
    sent = datetime.now(UTC)
    result = jobs.echo.apply_async(("later",), countdown=1)
    assert result.get(timeout=END_S) == "later"
    assert result.date_done - sent.replace(tzinfo=result.date_done.tzinfo) >= timedelta(seconds=1)


@pytest.mark.parametrize("zone", [UTC, ZoneInfo("Asia/Kolkata")], ids=["utc", "kolkata"])
def test_an_eta_of_any_time_zone_is_kept(jobs: Jobs, zone: Any) -> None:
    eta = datetime.now(zone) + timedelta(seconds=1)
    result = jobs.echo.apply_async(("later",), eta=eta)
    assert result.get(timeout=END_S) == "later"
    done = result.date_done.replace(tzinfo=result.date_done.tzinfo or UTC)
    assert done >= eta


def test_an_eta_that_is_past_is_now(jobs: Jobs) -> None:
    eta = datetime.now(UTC) - timedelta(hours=1)
    assert jobs.echo.apply_async(("now",), eta=eta).get(timeout=END_S) == "now"


def test_jobs_whose_time_comes_sooner_run_sooner(jobs: Jobs) -> None:
    last = jobs.note.apply_async(("last", "order"), countdown=6)
    jobs.note.apply_async(("first", "order"), countdown=0.5)
    last.get(timeout=END_S)
    assert jobs.notes("order") == ["first", "last"]


def test_a_step_of_a_chain_waits_for_its_time(jobs: Jobs) -> None:
    result = chain(jobs.echo.s(1), jobs.add.s(1).set(countdown=0.5), jobs.add.s(1)).delay()
    assert result.get(timeout=END_S) == 3


def test_inspect_shows_what_waits_for_its_time_and_when_that_is(jobs: Jobs) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=TOMORROW_S)
    result = jobs.echo.apply_async(("tomorrow",), eta=eta)
    wait_until(lambda: result.id in scheduled(jobs), END_S, "it is shown")
    entries = [entry for shown in jobs.inspect().scheduled().values() for entry in shown]
    (entry,) = {e["request"]["id"]: e for e in entries if e["request"]["id"] == result.id}.values()
    assert datetime.fromisoformat(entry["eta"]).astimezone(UTC) == eta
    assert entry["request"]["name"] == "features.echo"
    assert result.state == states.PENDING


def test_jobs_of_tomorrow_leave_their_slots_to_those_of_today(jobs: Jobs) -> None:
    waiting = [jobs.echo.apply_async((number,), countdown=TOMORROW_S) for number in range(3 * slots(jobs))]
    retried = [jobs.flaky.delay(1, countdown=TOMORROW_S) for _ in range(slots(jobs) + 1)]
    wait_until(lambda: {result.id for result in waiting} <= scheduled(jobs), END_S, "all wait for tomorrow")
    wait_until(lambda: all(result.state == states.RETRY for result in retried), END_S, "all wait for their retry")
    assert jobs.echo.delay("today").get(timeout=END_S) == "today"


def test_what_waits_for_its_time_outlives_its_node(jobs: Jobs) -> None:
    with running(jobs.new_node("victim")) as (victim,):
        with jobs.drained(*jobs.node_ids):
            soon = [jobs.note.apply_async(("soon", "after a death"), countdown=10) for _ in range(3)]
            ids, nodes = {result.id for result in soon}, (victim.id, *jobs.node_ids)
            wait_until(lambda: ids <= scheduled(jobs, *nodes), END_S, "they wait")
            victim.kill()
        assert [result.get(timeout=END_S) for result in soon] == ["soon"] * 3
        assert jobs.notes("after a death") == ["soon"] * 3


def test_what_waits_for_its_time_outlives_a_cold_restart_of_all_nodes(jobs: Jobs) -> None:
    with jobs.drained(*jobs.node_ids):
        with running(jobs.new_node("first")) as (first,):
            soon = jobs.note.apply_async(("soon", "after a restart"), countdown=8)
            wait_until(lambda: soon.id in scheduled(jobs, first.id, *jobs.node_ids), END_S, "it waits")
            first.signal(signal.SIGQUIT)
            wait_until(lambda: first.exit_code() is not None, END_S, "it ends")
        with running(jobs.new_node("second")):
            assert soon.get(timeout=END_S) == "soon"
    assert jobs.notes("after a restart") == ["soon"]


def test_a_job_that_was_revoked_while_it_waited_for_its_time_does_not_run(jobs: Jobs) -> None:
    result = jobs.note.apply_async(("it ran", "revoked while it waited"), countdown=6)
    wait_until(lambda: result.id in scheduled(jobs), END_S, "it waits")
    jobs.command("revoke", task_id=result.id)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=END_S)
    wait_until(lambda: not known_anywhere(jobs, result.id), END_S, "its time comes and goes")
    assert jobs.notes("revoked while it waited") == []


@pytest.mark.parametrize("expires", [0.3, timedelta(seconds=0.3)], ids=["seconds", "time"])
def test_a_job_that_expires_in_the_list_does_not_run(jobs: Jobs, gate: Gate, busy: list[Any], expires: Any) -> None:
    until = datetime.now(UTC) + expires if isinstance(expires, timedelta) else expires
    result = jobs.hold.apply_async((gate.name,), expires=until)
    over = datetime.now(UTC) + timedelta(seconds=0.5)
    wait_until(lambda: datetime.now(UTC) > over, END_S)
    gate.open()
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=END_S)
    assert (result.state, jobs.notes(f"started:{result.id}")) == (states.REVOKED, [])


def test_a_job_that_expires_before_its_time_does_not_run(jobs: Jobs) -> None:
    result = jobs.hold.apply_async(("nothing",), countdown=1, expires=0.5)
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=END_S)
    assert jobs.notes(f"started:{result.id}") == []


def test_a_job_knows_when_it_expires_and_so_does_its_retry(jobs: Jobs) -> None:
    described = jobs.describe.apply_async(expires=TOMORROW_S).get(timeout=END_S)
    assert datetime.fromisoformat(described["expires"]) > datetime.now(UTC)
    assert len(jobs.flaky.apply_async((1,), expires=TOMORROW_S).get(timeout=END_S)) == 2
