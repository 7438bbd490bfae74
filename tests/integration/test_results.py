"""The result backend: a job is ended once, by the delivery that stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context

from cluster_tasks import Cluster
from cluster_tasks.broker.deliveries import Deliveries, install
from cluster_tasks.broker.message import DELIVERY_PROPERTY, Delivery
from cluster_tasks.broker.sequels import complete
from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import EndNotStored, PayloadTooLarge, StaleCommit
from cluster_tasks.failover.evacuation import Remains
from tests.broker import Broker, make_message
from tests.waiting import wait_until


@pytest.fixture(params=[0, 5], ids=["results beside jobs", "results in another database"])
def app(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Celery]:
    backend = redis_url.removesuffix("/0") + f"/{request.param}"
    with Celery("ends", set_as_current=False, broker=redis_url, backend=backend) as app:
        Cluster(app)
        yield app
        app.backend.client.connection_pool.disconnect()


@pytest.fixture
def epoch(broker: Broker) -> str:
    return broker.open("a")


def take(broker: Broker, epoch: str, job_id: str, node_id: str = "a", **embedded: Any) -> Context:
    """Let a node fetch a job; return the request that its task has."""
    broker.publish(job_id)
    (tag,) = broker.fetch(node_id, epoch).messages
    return Context({"id": job_id, "properties": {DELIVERY_PROPERTY: [node_id, epoch, tag]}, **embedded})


def stale(broker: Broker) -> int:
    return int(broker.client.hget(broker.keys.counters, "stale_commits") or 0)


def test_a_result_and_the_end_of_its_delivery_are_one_step(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, "job")
    app.backend.mark_as_done("job", 42, request=request)
    assert app.AsyncResult("job").result == 42
    assert not broker.held("a", epoch)
    # A reply that was lost makes Celery repeat it.
    app.backend.mark_as_done("job", 42, request=request)
    assert stale(broker) == 0


RESULTS = [{"vectors": [[0.1, -2.5e-8, 3]], "text": "né"}, {"at": datetime(2026, 1, 1, tzinfo=UTC)}, [None], "", 0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"result_compression": "zlib"}, {"result_serializer": "pickle", "result_accept_content": ["pickle"]}],
    ids=["JSON", "compressed", "pickled"],
)
@pytest.mark.parametrize("result", RESULTS, ids=str)
@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own way to store a result that expires.
def test_a_plain_celery_reads_the_results_and_the_cluster_those_of_it(
    broker: Broker, app: Celery, epoch: str, redis_url: str, settings: dict[str, Any], result: Any
) -> None:
    app.conf.update(settings)
    app.backend.mark_as_done("job", result, request=take(broker, epoch, "job"))
    with Celery("plain", set_as_current=False, broker=redis_url, backend=app.conf.result_backend) as plain:
        plain.conf.update(settings)
        plain.backend.store_result("other", result, "SUCCESS")
        for reader in (app, plain):
            assert [reader.AsyncResult(job_id).result for job_id in ("job", "other")] == [result, result]


def test_a_fenced_node_commits_nothing(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, "job")
    assert broker.epochs.fence("a", broker.epochs.beats()["a"])
    with pytest.raises(StaleCommit, match="its delivery was taken away"):
        app.backend.mark_as_done("job", 42, request=request)
    with pytest.raises(StaleCommit):
        app.backend.mark_as_failure("job", ValueError("no"), request=request)
    assert app.AsyncResult("job").state == "PENDING"
    assert stale(broker) == 2


def test_of_two_deliveries_of_a_job_the_first_commits(broker: Broker, app: Celery, epoch: str) -> None:
    first, second = take(broker, epoch, "job"), take(broker, epoch, "job")
    app.backend.mark_as_done("job", "first", request=first)
    with pytest.raises(StaleCommit, match="it had ended before"):
        app.backend.mark_as_done("job", "second", request=second)
    assert app.AsyncResult("job").result == "first"


@pytest.mark.parametrize("ending", ["done", "failure", "revoked"])
def test_a_job_without_a_result_ends_once_too(ending: str, broker: Broker, app: Celery, epoch: str) -> None:
    first, second = take(broker, epoch, "job"), take(broker, epoch, "job")
    end = {
        "done": lambda request: app.backend.mark_as_done("job", None, request=request, store_result=False),
        "failure": lambda request: app.backend.mark_as_failure(
            "job", ValueError(), request=request, store_result=False
        ),
        "revoked": lambda request: app.backend.mark_as_revoked("job", request=request, store_result=False),
    }[ending]
    end(first)
    with pytest.raises(StaleCommit):
        end(second)
    assert app.AsyncResult("job").state == "PENDING"
    assert 0 < broker.client.ttl(broker.keys.terminal("job")) <= 300


def test_what_is_followed_by_something_is_held_until_that_is_done(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, "job", errbacks=[])
    request.errbacks = [app.signature("told")]
    app.backend.mark_as_failure("job", ValueError("no"), request=request, call_errbacks=False)
    assert broker.held("a", epoch) == ["job"]


def take_to_its_end(broker: Broker, app: Celery, epoch: str, wanted: bool = True) -> Context:
    """Let a job fail that an errback follows; a crash comes before that."""
    request = take(broker, epoch, "job", delivery_info={})
    request.errbacks = [app.signature("told", options={"task_id": "told", "queue": "node.b"})]
    app.backend.mark_as_failure("job", ValueError("no"), request=request, store_result=wanted, call_errbacks=False)
    return request


@pytest.mark.parametrize("wanted", [True, False])
def test_an_end_that_something_follows_outlives_its_result_while_its_delivery_stands(
    wanted: bool, broker: Broker, app: Celery, epoch: str
) -> None:
    # All nodes die before the acknowledgement, and come back when the result has expired.
    app.conf.result_expires = 1
    embedded = take_to_its_end(broker, app, epoch, wanted).errbacks
    wait_until(lambda: app.AsyncResult("job").state == "PENDING", message="the result expires")
    broker.epochs.fence("a", broker.epochs.beats()["a"])
    broker.evacuation.move_remains(Remains("a", epoch))
    later = broker.open("b")
    (tag,) = broker.fetch("b", later).messages
    properties = {DELIVERY_PROPERTY: ["b", later, tag]}
    request = Context({"id": "job", "properties": properties, "errbacks": embedded, "delivery_info": {}})
    with pytest.raises(StaleCommit, match="it had ended before"):
        app.backend.mark_as_done("job", 42, request=request)
    complete(app.backend, request)
    assert broker.listed("node.b") == ["told"]


@pytest.mark.parametrize("way", ["with a fetch", "at the bell", "as what cannot be told"])
def test_what_was_kept_of_an_end_goes_when_its_delivery_is_let_go(
    way: str, broker: Broker, app: Celery, epoch: str
) -> None:
    delivery = Delivery.of(take_to_its_end(broker, app, epoch).properties)
    assert delivery is not None
    marker, kept = broker.keys.terminal("job"), broker.keys.kept_end("job")
    assert (broker.client.ttl(marker), broker.client.ttl(kept)) == (-1, -1)
    if way == "with a fetch":
        broker.fetch("a", epoch, acked=[delivery.tag])
    elif way == "at the bell":
        broker.placer.let_go(broker.keys.unacked("a", epoch), {delivery.tag: "job"})
    else:
        unacked = broker.keys.unacked("a", epoch)
        broker.placer.set_aside_held(unacked, delivery.tag, broker.client.hget(unacked, delivery.tag))
    assert not broker.held("a", epoch)
    assert 0 < broker.client.ttl(marker) <= app.conf.result_expires.total_seconds()
    assert not broker.client.exists(kept)


def test_an_acknowledgement_of_what_was_taken_away_lets_no_end_expire(broker: Broker, app: Celery, epoch: str) -> None:
    delivery = Delivery.of(take_to_its_end(broker, app, epoch).properties)
    assert delivery is not None
    broker.epochs.fence("a", broker.epochs.beats()["a"])
    broker.placer.let_go(broker.keys.unacked("a", epoch), {delivery.tag: "job"})
    assert broker.client.ttl(broker.keys.terminal("job")) == -1


@pytest.mark.parametrize("wanted", [True, False])
def test_what_follows_an_end_can_be_done_later_though_nobody_wanted_the_result(
    wanted: bool, broker: Broker, app: Celery, epoch: str
) -> None:
    request = take(broker, epoch, "job", delivery_info={})
    request.errbacks = [app.signature("told", options={"task_id": "told", "queue": "node.a"})]
    app.backend.mark_as_failure("job", ValueError(), request=request, store_result=wanted, call_errbacks=False)
    # A crash comes between the two.
    complete(app.backend, request)
    assert broker.listed("node.a") == ["told"]


def test_a_job_that_was_revoked_in_its_list_cannot_succeed_any_more(broker: Broker, app: Celery, epoch: str) -> None:
    broker.publish("job")
    app.backend.mark_as_revoked("job", "revoked")
    assert app.AsyncResult("job").state == "REVOKED"
    (tag,) = broker.fetch("a", epoch).messages
    request = Context({"id": "job", "properties": {DELIVERY_PROPERTY: ["a", epoch, tag]}})
    with pytest.raises(StaleCommit):
        app.backend.mark_as_done("job", 42, request=request)
    # Who finds it so in its list has nothing to object.
    app.backend.mark_as_revoked("job", "revoked", request=request)
    assert not broker.held("a", epoch)


def test_what_another_node_holds_may_run_and_is_not_ended_by_a_revocation(
    broker: Broker, app: Celery, epoch: str
) -> None:
    request = take(broker, epoch, "job")
    take(broker, broker.open("b"), "other", node_id="b")
    app.backend.mark_as_revoked("job", "revoked")
    assert app.AsyncResult("job").state == "PENDING"
    app.backend.mark_as_done("job", 42, request=request)
    assert app.AsyncResult("job").result == 42
    assert stale(broker) == 0


def test_a_node_that_holds_a_job_and_does_not_run_it_ends_it_at_its_revocation(
    broker: Broker, app: Celery, epoch: str
) -> None:
    request = take(broker, epoch, "job")
    register = Deliveries("a", (), broker.keys, broker.client, ManualClock(), lambda: 1)
    register.begin(epoch)
    install(register)
    try:
        app.backend.mark_as_revoked("job", "revoked")
    finally:
        install(None)
    assert app.AsyncResult("job").state == "REVOKED"
    app.backend.mark_as_revoked("job", "revoked", request=request)
    assert not broker.held("a", epoch)


def test_a_job_that_comes_of_one_that_is_held_is_ended_by_its_revocation(
    broker: Broker, app: Celery, epoch: str
) -> None:
    message = json.loads(make_message("held"))
    message["headers"].update(root_id="job", parent_id="job")
    broker.put(json.dumps(message).encode())
    broker.fetch("a", epoch)
    app.backend.mark_as_revoked("job", "revoked")
    assert app.AsyncResult("job").state == "REVOKED"


def test_a_revocation_that_comes_too_late_changes_nothing(broker: Broker, app: Celery, epoch: str) -> None:
    app.backend.mark_as_done("job", 42, request=take(broker, epoch, "job"))
    app.backend.mark_as_revoked("job", "revoked")
    assert app.AsyncResult("job").result == 42


def test_how_far_a_job_has_come_is_told_by_its_delivery_only(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, "job")
    app.backend.store_result("job", {"half": 1}, "PROGRESS", request=request)
    assert app.AsyncResult("job").state == "PROGRESS"
    app.backend.mark_as_done("job", 42, request=request)
    app.backend.store_result("job", {"half": 2}, "PROGRESS", request=request)
    assert app.AsyncResult("job").state == "SUCCESS"


TOLD = {"exc_type": "ValueError", "exc_message": ["told"]}


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_an_end_that_a_task_tells_while_it_runs_is_replaced_by_what_comes(
    state: str, broker: Broker, app: Celery, epoch: str
) -> None:
    request = take(broker, epoch, "job")
    app.backend.store_result("job", TOLD, state, request=request)
    assert app.AsyncResult("job").state == state
    assert broker.held("a", epoch) == ["job"]
    app.backend.mark_as_done("job", 42, request=request)
    assert app.AsyncResult("job").result == 42
    assert not broker.held("a", epoch)
    assert stale(broker) == 0


def test_nothing_follows_an_end_that_a_task_has_only_told(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, "job", delivery_info={})
    request.errbacks = [app.signature("told", options={"task_id": "told", "queue": "node.a"})]
    app.backend.store_result("job", TOLD, "FAILURE", request=request)
    complete(app.backend, request)
    assert broker.listed("node.a") == []


def test_an_end_that_a_task_cannot_tell_is_not_passed_over(broker: Broker, app: Celery, epoch: str) -> None:
    # It may be the last that is heard of the job.
    request = take(broker, epoch, "job")
    broker.client.config_set("min-replicas-to-write", 1)
    app.backend.retry_policy = {"max_retries": 1, "interval_start": 0.0}
    try:
        with pytest.raises(EndNotStored, match="FAILURE of job job could not be stored"):
            app.backend.store_result("job", TOLD, "FAILURE", request=request)
    finally:
        broker.client.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize("error", [StaleCommit("refused"), EndNotStored("Redis was away")])
def test_an_end_that_was_refused_or_not_stored_is_not_replaced_by_a_failure(
    error: Exception, broker: Broker, app: Celery, epoch: str
) -> None:
    # Celery takes it for an error of the task; the delivery may stand again by then, on a Redis that was promoted.
    request = take(broker, epoch, "job")
    with pytest.raises(type(error)):
        app.backend.mark_as_failure("job", error, request=request)
    assert app.AsyncResult("job").state == "PENDING"
    assert broker.held("a", epoch) == ["job"]


def test_a_part_of_a_chord_that_cannot_be_counted_has_not_failed(broker: Broker, app: Celery, epoch: str) -> None:
    # Its end may be lost with a Redis that was demoted: then Celery's failure would be the first end on the new one.
    chord = {"task": "body", "options": {"task_id": "body"}, "chord_size": 1}
    request = take(broker, epoch, "job", group="parts", chord=chord)
    broker.client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(EndNotStored, match="part job of a chord could not be counted"):
            app.backend.on_chord_part_return(request, "SUCCESS", 42)
    finally:
        broker.client.config_set("min-replicas-to-write", 0)


def test_a_job_goes_on_though_redis_takes_no_news_of_it(
    broker: Broker, app: Celery, epoch: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = take(broker, epoch, "job")
    broker.client.config_set("min-replicas-to-write", 1)
    app.backend.retry_policy = {"max_retries": 1, "interval_start": 0.0}
    try:
        app.backend.mark_as_retry("job", ValueError("not yet"), request=request)
    finally:
        broker.client.config_set("min-replicas-to-write", 0)
    assert "it could not be told that job job is RETRY" in caplog.text


@pytest.mark.parametrize("wanted", [True, False], ids=["a result", "what a chord is told"])
def test_what_is_larger_than_may_be_stored_is_no_end(
    wanted: bool, broker: Broker, app: Celery, epoch: str, caplog: pytest.LogCaptureFixture
) -> None:
    most = 100_000
    app.conf.broker_transport_options["cluster_max_result_bytes"] = most
    # Characters are not bytes: these are more than they seem to be.
    large = "é" * (most // 2 + 1)
    request = take(broker, epoch, "job", task="jobs.work", chord={"task": "body", "options": {"task_id": "body"}})
    app.backend.store_result("job", large, "PROGRESS", request=request)
    assert "it could not be told that job job is PROGRESS: PayloadTooLarge" in caplog.text
    with pytest.raises(PayloadTooLarge, match=f"the result of a job of jobs.work has .* and may have {most}"):
        app.backend.mark_as_done("job", large, request=request, store_result=wanted)
    assert broker.held("a", epoch) == ["job"]
    app.backend.mark_as_failure("job", ValueError(large), request=request, store_result=wanted)
    assert "the error of a job of jobs.work has" in str(app.backend.kept_end("job")["result"])


def test_a_result_as_large_as_may_be_is_stored(broker: Broker, app: Celery, epoch: str) -> None:
    app.conf.broker_transport_options["cluster_max_result_bytes"] = 100_000
    app.backend.mark_as_done("job", "x" * 99_500, request=take(broker, epoch, "job"))
    assert len(app.AsyncResult("job").result) == 99_500


@pytest.mark.parametrize("chord", [None, {"task": "body", "options": {"task_id": "body"}}])
def test_of_two_ends_by_one_delivery_the_first_counts(chord: Any, broker: Broker, app: Celery, epoch: str) -> None:
    # A child succeeds, and its parent, which has not heard of it yet, ends the job for its time limit.
    request = take(broker, epoch, "job", chord=chord)
    app.backend.mark_as_done("job", 42, request=request)
    with pytest.raises(StaleCommit):
        app.backend.mark_as_failure("job", TimeoutError(), request=request)
    assert app.AsyncResult("job").result == 42
