"""What goes with a job: its id, headers, priority, encoding, size."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, signals

from tests.process.celery_features.conftest import END_S, Gate, Jobs, values


def test_a_job_has_the_id_that_the_caller_gave_it(jobs: Jobs) -> None:
    result = jobs.describe.s().apply_async(task_id="an id of my own")
    assert result.id == "an id of my own"
    told = result.get(timeout=END_S)
    assert (told["id"], told["root_id"], told["correlation_id"]) == (result.id, result.id, result.id)


def test_a_job_can_be_sent_by_name(jobs: Jobs) -> None:
    assert jobs.app.send_task("features.describe").get(timeout=END_S)["hostname"] in jobs.node_ids


def test_a_job_can_be_sent_by_an_app_that_knows_nothing_of_the_cluster(jobs: Jobs) -> None:
    url = jobs.server.url
    with Celery("other", broker=url, backend=url, set_as_current=False) as other:
        assert other.send_task("features.add", (1, 2)).get(timeout=END_S) == 3


def test_a_job_in_a_queue_that_the_caller_names_runs(jobs: Jobs) -> None:
    assert jobs.describe.apply_async(queue="celery").get(timeout=END_S)["hostname"] in jobs.node_ids


def test_headers_of_the_call_reach_the_job(jobs: Jobs) -> None:
    told = jobs.describe.apply_async(headers={"tenant": "anna", "trace": {"span": 1}}).get(timeout=END_S)
    assert {name: told["headers"][name] for name in ("tenant", "trace")} == {"tenant": "anna", "trace": {"span": 1}}


@pytest.mark.parametrize("place", ["the list of a node", "a waiting list"])
def test_more_urgent_jobs_of_a_list_run_first(jobs: Jobs, gate: Gate, place: str) -> None:
    (node, other), key = jobs.node_ids, f"urgent first in {place}"
    options = {"queue": jobs.cluster.keys.node_queue(node)} if place == "the list of a node" else {}
    first = Gate(jobs)
    with jobs.drained(other):
        held = [jobs.hold.delay(each.name) for each in (first, gate)]
        jobs.wait_started(*held)
        with jobs.drained(*([] if options else [node])):
            for priority in (9, 6, 3, 0):
                jobs.note.apply_async((priority, key), priority=priority, **options)
        # One slot runs all of them, one after the other.
        first.open()
        assert jobs.wait_for_notes(key, 4) == [0, 3, 6, 9]


def test_a_job_knows_its_priority(jobs: Jobs) -> None:
    assert jobs.describe.apply_async(priority=3).get(timeout=END_S)["priority"] == 3


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_a_compressed_message_is_read(jobs: Jobs, compression: str) -> None:
    text = "the same words again and again " * 1000
    assert jobs.echo.apply_async((text,), compression=compression).get(timeout=END_S) == text


def test_a_serializer_of_the_users_own_is_used(jobs: Jobs) -> None:
    assert jobs.echo.apply_async(({"Word": ["a", 1]},), serializer="shout").get(timeout=END_S) == {"Word": ["a", 1]}


def test_compressed_messages_of_a_serializer_of_ones_own_wait_in_a_list(jobs: Jobs) -> None:
    with jobs.drained():
        result = jobs.echo.apply_async(("Wait",), serializer="shout", compression="gzip")
    assert result.get(timeout=END_S) == "Wait"


@pytest.mark.parametrize("text", ["żółw 🐢 中文 \x00 \u2028", "\ud7ff\ue000", 'quotes " and \\ and \n', ""])
def test_any_text_comes_back_as_it_was(jobs: Jobs, text: str) -> None:
    assert jobs.echo.delay(text).get(timeout=END_S) == text


def test_values_that_json_knows_come_back_as_they_were(jobs: Jobs) -> None:
    value = {"empty": [[], {}], "large": 2**70, "small": 1e-300, "none": None, "nested": {"a": [True, False]}}
    assert jobs.echo.delay(value).get(timeout=END_S) == value


def test_five_megabytes_come_and_go(jobs: Jobs) -> None:
    text = "0123456789abcdef" * 330_000
    assert jobs.echo.delay(text).get(timeout=END_S) == text


def test_three_hundred_jobs_sent_at_once_all_run(jobs: Jobs) -> None:
    results = [jobs.echo.delay(number) for number in range(300)]
    assert values(results) == list(range(300))


def test_one_producer_sends_many_jobs(jobs: Jobs) -> None:
    with jobs.app.producer_or_acquire() as producer:
        results = [jobs.echo.apply_async((number,), producer=producer) for number in range(5)]
    assert values(results) == list(range(5))


def test_the_caller_is_told_of_what_he_sends(jobs: Jobs) -> None:
    told: list[tuple[str, str]] = []

    def before(sender: str, headers: dict[str, Any], **_: Any) -> None:
        told.append(("before", headers["id"]))

    def after(sender: str, headers: dict[str, Any], **_: Any) -> None:
        told.append(("after", headers["id"]))

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    try:
        result = jobs.echo.delay("signalled")
    finally:
        signals.before_task_publish.disconnect(before)
        signals.after_task_publish.disconnect(after)
    assert told == [("before", result.id), ("after", result.id)]
    assert result.get(timeout=END_S) == "signalled"


def test_a_job_can_be_run_in_the_callers_process(jobs: Jobs) -> None:
    assert jobs.add.apply((1, 2)).get() == 3
    assert (jobs.add.s(1, 2) | jobs.add.s(3)).apply().get() == 6
    assert jobs.add(1, 2) == 3
