"""What a node does with a job between its fetch and the pool, and in the pool, step by step."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject, SoftTimeLimitExceeded
from celery.worker.state import revoked
from kombu.message import Message

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker import deliveries
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.message import BATCH_PROPERTY, DELIVERY_PROPERTY
from cluster_tasks.clock import ManualClock
from tests.broker import Broker, make_members, make_message
from workers.batches import Batches, trace_batch
from workers.members import trace_members
from workers.request import ClusterRequest

Together = Callable[[Celery, list[Any]], list[Any]]
NewRequest = Callable[..., ClusterRequest]


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with Celery("requests", set_as_current=False, broker=redis_url, backend=redis_url) as app:
        # An outage of Redis is told after a moment, not after twenty seconds.
        app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1, "interval_max": 0}}
        Cluster(app)
        yield app
        app.backend.client.connection_pool.disconnect()


@pytest.fixture
def node(broker: Broker) -> Iterator[Deliveries]:
    """A node with two places, which this process is."""
    node = Deliveries("a", (), broker.keys, broker.client, ManualClock(), lambda: 2)
    node.begin(broker.open("a"))
    node.renew(1e9)
    deliveries.install(node)
    yield node
    deliveries.install(None)


def declare(app: Celery, together: Together, **options: Any) -> Any:
    """A task whose jobs can be done together, as the pool has it."""

    @app.task(base=ClusterTask, name="jobs.work", shared=False, together=together, batch=4, **options)
    def work(text: str) -> str:
        return f"{text} alone"

    app.set_current()
    app.finalize()
    task = app.tasks["jobs.work"]
    task.__trace__ = build_tracer(task.name, task, app=app)
    return task


@pytest.fixture
def new_request(app: Celery, broker: Broker, node: Deliveries) -> NewRequest:
    """Let the node fetch a job and read it."""

    def receive(task: Any, job_id: str, **headers: Any) -> ClusterRequest:
        made = json.loads(make_message(job_id, **{BATCH_PROPERTY: "4 jobs.work"}))
        made["headers"].update(headers)
        broker.put(json.dumps(made).encode(), "node.a")
        epoch, first_tag, acked = node.next_fetch()
        node.receive(list(broker.fetch("a", epoch, first_tag=first_tag).messages.items()), acked)
        delivery, message, _ = node.next() or pytest.fail("nothing was fetched")
        payload = json.loads(message)
        payload["properties"][DELIVERY_PROPERTY] = [delivery.node_id, delivery.epoch, delivery.tag]
        read = Message(
            b64decode(payload["body"]), delivery.tag, payload["content-type"], payload["content-encoding"],
            payload["properties"]["delivery_info"], payload["properties"], payload["headers"],
        )  # fmt: skip
        return ClusterRequest(
            read, app=app, task=task, hostname="a", connection_errors=(), decoded=False, utc=True,
            on_ack=lambda *_, **__: node.ack(delivery.tag), on_reject=lambda *_, **__: node.requeue(delivery.tag),
        )  # fmt: skip

    return receive


def done(app: Celery, calls: list[Any]) -> list[str]:
    return [f"{call['text']} with others" for call in calls]


def test_that_an_end_before_the_start_cannot_be_stored_is_no_error_of_the_event_loop(
    app: Celery, broker: Broker, node: Deliveries, new_request: NewRequest
) -> None:
    long_ago = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
    request = new_request(declare(app, done), "late", expires=long_ago)
    broker.client.config_set("maxmemory", "1")
    try:
        assert request.revoked()
    finally:
        broker.client.config_set("maxmemory", "0")
    assert node.held() == 0
    assert broker.held("a", node.epoch) == ["late"]
    assert node.resync() == 1


def gathered_by(batches: Batches) -> tuple[Any, list[ClusterRequest]]:
    """Celery's consumer, and what it hands to the pool."""
    handed: list[ClusterRequest] = []
    consumer = SimpleNamespace(on_task_request=handed.append)
    batches.gather(consumer)
    return consumer, handed


@pytest.mark.parametrize("limit", [{"rate_limit": "1/m"}, {"time_limit": 5}, {"soft_time_limit": 5}])
def test_a_job_whose_task_was_limited_by_remote_control_is_handed_over_when_its_turn_has_come(
    limit: dict[str, Any], app: Celery, node: Deliveries, new_request: NewRequest
) -> None:
    task = declare(app, done)
    consumer, handed = gathered_by(Batches())
    for name, value in limit.items():
        setattr(task, name, value)
    request = new_request(task, "a")
    # From a timer of Celery's, not while a fetch is read.
    consumer.on_task_request(request)
    assert handed == [request]


def test_a_batch_whose_first_job_is_out_of_it_fills_its_place(
    app: Celery, node: Deliveries, new_request: NewRequest
) -> None:
    task = declare(app, done)
    batches = Batches()
    consumer, handed = gathered_by(batches)
    requests = [new_request(task, job_id) for job_id in "abc"]
    for request in requests[1:]:
        node.put_beside(request.delivery_tag)
    for request in requests:
        consumer.on_task_request(request)
    batches.all_read()
    assert (handed, node.free_slots()) == ([requests[0]], 1)
    revoked.add("a")
    pool = SimpleNamespace(apply_async=lambda *_, **__: None)
    handed[0].execute_using_pool(pool)
    assert [request.id for request in requests if request.batch is not None] == ["b", "c"]
    assert (node.held(), node.free_slots()) == (2, 1)


def calls_of(*requests: ClusterRequest) -> list[Any]:
    return [request.call for request in requests]


def is_given_back(outcome: Any) -> bool:
    failed, told, _ = outcome
    # So it goes from one process to another.
    error = told.exception.exc if failed else None
    return isinstance(error, Reject) and error.requeue


def out_of_time(app: Celery, calls: list[Any]) -> list[str]:
    raise SoftTimeLimitExceeded(3)


def failing_late(app: Celery, calls: list[Any]) -> list[str]:
    time.sleep(1.1)
    raise RuntimeError("none of them can be done")


@pytest.mark.parametrize("together", [out_of_time, failing_late])
def test_jobs_are_given_back_that_would_be_run_in_what_is_left_of_the_time_of_all(
    together: Together, app: Celery, broker: Broker, node: Deliveries, new_request: NewRequest
) -> None:
    task = declare(app, together)
    outcomes = trace_batch(calls_of(*(new_request(task, job_id) for job_id in "ab")))
    assert list(map(is_given_back, outcomes)) == [True, True]
    assert sorted(broker.held("a", node.epoch)) == ["a", "b"]


@pytest.mark.parametrize("together", [out_of_time, failing_late])
def test_members_are_given_back_that_would_be_run_in_what_is_left_of_the_time_of_all(
    together: Together, app: Celery, broker: Broker, node: Deliveries
) -> None:
    declare(app, together)
    message = make_members("ab")
    broker.put(message)
    (tag,) = broker.fetch("a", node.epoch).messages
    body = json.loads(b64decode(json.loads(message)["body"]))
    properties = {DELIVERY_PROPERTY: ["a", node.epoch, tag]}
    request = {**json.loads(message)["headers"], "properties": properties, "delivery_info": {}, "task": "jobs.work"}
    assert is_given_back(trace_members("jobs.work", "message", request, body, "", ""))
    assert [app.AsyncResult(job_id).state for job_id in "ab"] == ["PENDING", "PENDING"]
