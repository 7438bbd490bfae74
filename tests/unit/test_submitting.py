"""How the jobs that are submitted together are put into messages, and who may share one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.tasks import submitting
from cluster_tasks.tasks.embedding import _apportioned
from cluster_tasks.tasks.submitting import MOST_BYTES, MOST_MEMBERS, _Call, _can_share_messages, _chunks


def calls(*texts: str) -> list[_Call]:
    return [_Call((text,), {}) for text in texts]


def sizes(given: list[_Call], most: int) -> list[int]:
    return [len(chunk) for chunk in _chunks(given, most)]


def test_a_message_has_no_more_members_than_it_may() -> None:
    assert sizes(calls(*"abcdefg"), 3) == [3, 3, 1]
    assert sizes([], 3) == []


def test_a_message_has_no_more_bytes_than_it_may() -> None:
    third = "x" * (MOST_BYTES // 3 + 1)
    assert sizes(calls(third, third, third, "a", third), MOST_MEMBERS) == [2, 3]


def test_what_is_too_long_for_company_is_alone() -> None:
    assert sizes(calls("a", "x" * 2 * MOST_BYTES, "b"), MOST_MEMBERS) == [1, 1, 1]


def double(text: str) -> str:
    return 2 * text


def declared(app: Celery, **options: Any) -> Any:
    declared = app.task(base=ClusterTask, shared=False, **options)(double)
    # What the decorator gives stands for it.
    return app.tasks[declared.name]


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("submitting", broker="redis://", backend="redis://", set_as_current=False) as app:
        Cluster(app)
        yield app


@pytest.mark.parametrize(
    ("options", "can"),
    [
        ({}, True),
        ({"max_retries": 5, "ignore_result": True, "compression": "zlib"}, True),
        ({"rerun_on_crash": False}, False),
        ({"time_limit": 5}, False),
        ({"soft_time_limit": 5}, False),
        ({"rate_limit": "1/s"}, False),
        ({"serializer": "pickle"}, False),
        ({"instead": lambda *_, **__: None}, False),
    ],
)
def test_jobs_share_a_message_where_none_needs_what_celery_does_for_one(
    app: Celery, options: dict[str, Any], can: bool
) -> None:
    task = declared(app, **options)
    assert _can_share_messages(task) is can


def test_jobs_whose_results_are_stored_elsewhere_are_sent_one_by_one() -> None:
    with Celery("elsewhere", broker="redis://", backend="cache+memory://", set_as_current=False) as app:
        Cluster(app)
        task = declared(app)
        assert not _can_share_messages(task)


def test_eager_jobs_are_over_when_they_are_submitted(app: Celery) -> None:
    app.conf.task_always_eager = True
    task = declared(app)
    sent = submitting.submit(task, ["a", ("b",), {"text": "c"}], 1)
    assert sent.ready()
    assert sent.get() == ["aa", "bb", "cc"]
    assert [result.get() for result in sent] == ["aa", "bb", "cc"]


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(6, [1, 2, 3], [1, 2, 3]), (10, [1, 1, 1], [3, 3, 4]), (0, [1, 2], [0, 0]), (5, [0, 0], [0, 5]), (7, [4], [7])],
)
def test_a_share_is_a_whole_number_and_all_of_them_are_the_total(
    total: int, weights: list[int], shares: list[int]
) -> None:
    assert _apportioned(total, weights) == shares
