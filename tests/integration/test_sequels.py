"""What follows a job: with ids of its own, once, and only by a delivery that stands."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group, states
from celery.app.task import Context

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker.message import DELIVERY_PROPERTY
from cluster_tasks.broker.sequels import ending
from cluster_tasks.errors import EndNotStored, StaleCommit
from tests.broker import Broker


@pytest.fixture(params=["0", "5"], ids=["results beside the jobs", "in another database"])
def app(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Celery]:
    results = f"{redis_url.rpartition('/')[0]}/{request.param}"
    with Celery("sequels", set_as_current=False, broker=redis_url, backend=results) as app:
        Cluster(app)

        @app.task(base=ClusterTask, shared=False, name="work", request_type="any")
        def work(*_: Any) -> None:
            """Nothing is run here."""

        yield app
        app.backend.client.connection_pool.disconnect()


@pytest.fixture
def epoch(broker: Broker) -> str:
    return broker.open("a")


def fetched(broker: Broker, epoch: str) -> Context:
    """Let the node ``a`` fetch a job; return the request that its task has."""
    broker.publish("first")
    (tag,) = broker.fetch("a", epoch).messages
    return Context({"id": "first", "properties": {DELIVERY_PROPERTY: ["a", epoch, tag]}})


def followers(broker: Broker) -> list[str]:
    """The jobs that wait for a node, or for their time."""
    delayed = [str(entry) for entry in broker.client.zrange(broker.keys.delayed, 0, -1)]
    return [*broker.waiting(), *broker.listed(broker.keys.node_queue("a")), *delayed]


def sent(app: Celery, **options: Any) -> dict[str, Any]:
    """Send a job; return what its message embeds."""
    embedded: list[Any] = []
    send = app.amqp.send_task_message
    app.amqp.send_task_message = lambda *args, **given: (send(*args, **given), embedded.append(args[2].body[2]))[0]
    app.tasks["work"].apply_async(**options)
    app.amqp.send_task_message = send
    return embedded[0]


def ids(signature: Any) -> list[str]:
    """The ids of the jobs of a signature."""
    tasks = signature["kwargs"].get("tasks") or [signature]
    return [task["options"]["task_id"] for task in tasks]


@pytest.mark.parametrize("kind", ["job", "group", "chain"])
def test_each_job_has_links_of_its_own_though_all_are_given_the_same_signature(kind: str, app: Celery) -> None:
    work = app.tasks["work"]
    link = {"job": work.s, "group": lambda: group(work.s(1), work.s(2)), "chain": lambda: chain(work.s(1), work.s(2))}
    given = link[kind]()
    before = repr(dict(given))
    first, second = sent(app, link=given), sent(app, link=given)
    found = [*ids(first["callbacks"][0]), *ids(second["callbacks"][0])]
    assert len(set(found)) == len(found) == (2 if kind == "job" else 4)
    assert repr(dict(given)) == before


def test_the_errbacks_of_a_chord_are_the_same_for_all_parts_of_its_header(app: Celery) -> None:
    work = app.tasks["work"]
    body = work.s().on_error(work.s())
    body.freeze()
    parts = [sent(app, chord=body)["chord"]["options"]["link_error"] for _ in range(2)]
    assert parts[0] == parts[1]
    assert ids(parts[0][0])


@pytest.mark.parametrize("countdown", [None, 60])
def test_a_sequel_that_is_published_again_comes_once(
    countdown: float | None, app: Celery, broker: Broker, epoch: str
) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    request.callbacks = [work.s().set(task_id="link")]
    with ending(request):
        for _ in range(2):
            work.apply_async(task_id="link", countdown=countdown)
            work.apply_async(task_id="other", countdown=countdown)
    assert sum("link" in job for job in followers(broker)) == 1
    # A task may publish anything else as often as it likes.
    assert sum("other" in job for job in followers(broker)) == 2


def test_each_attempt_at_a_job_comes_once(app: Celery, broker: Broker, epoch: str) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    with ending(request):
        for retries in (1, 1, 2, 2):
            work.apply_async(task_id="first", retries=retries)
        work.apply_async(task_id="first", replaced_task_nesting=1)
    assert len(followers(broker)) == 3


def test_a_task_that_sends_itself_anew_is_no_retry(app: Celery, broker: Broker, epoch: str) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    with ending(request):
        work.apply_async(task_id="first")
        work.apply_async(task_id="first")
    assert followers(broker) == ["first", "first"]


@pytest.mark.parametrize("countdown", [None, 60])
def test_what_follows_the_job_of_a_fenced_node_is_refused(
    countdown: float | None, app: Celery, broker: Broker, epoch: str
) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    request.chain = [work.s().set(task_id="last"), work.s().set(task_id="next")]
    assert broker.epochs.fence("a", broker.epochs.beats()["a"])
    with ending(request), pytest.raises(StaleCommit, match="a must not publish what follows its job"):
        work.apply_async(task_id="next", countdown=countdown)
    with ending(request), pytest.raises(StaleCommit):
        work.apply_async(task_id="first", retries=1, countdown=countdown)
    assert followers(broker) == []


def test_a_job_that_was_ended_meanwhile_is_not_tried_again(app: Celery, broker: Broker, epoch: str) -> None:
    app.backend.mark_as_revoked("first", "revoked")
    request = fetched(broker, epoch)
    with ending(request):
        app.tasks["work"].apply_async(task_id="first", retries=1)
    assert followers(broker) == []


def test_with_the_end_of_a_job_it_is_forgotten_what_has_followed(app: Celery, broker: Broker, epoch: str) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    request.callbacks = [work.s().set(task_id="link")]
    with ending(request):
        work.apply_async(task_id="link")
    followed = broker.keys.followed("first")
    assert broker.client.smembers(followed) == {b"link/0.0"}
    app.backend.mark_as_done("first", 42, request=request)
    assert not broker.client.exists(followed)


# Celery stores the ends of steps that nobody has sent.
@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")
@pytest.mark.parametrize("was_sent", [True, False])
def test_the_next_step_of_a_chain_fails_with_a_job_unless_an_earlier_run_has_sent_it(
    was_sent: bool, app: Celery, broker: Broker, epoch: str
) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    request.chain = [work.s().set(task_id="last"), work.s().set(task_id="next")]
    if was_sent:
        with ending(request):
            work.apply_async(task_id="next")
    app.backend.mark_as_failure("first", ValueError("no"), request=request)
    ends = [app.AsyncResult(job_id).state for job_id in ("first", "next", "last")]
    assert ends == ["FAILURE", *["PENDING" if was_sent else "FAILURE"] * 2]


def test_a_fencing_token_is_that_of_the_delivery(app: Celery, broker: Broker, epoch: str) -> None:
    request, work = fetched(broker, epoch), app.tasks["work"]
    work.push_request(**request.__dict__)
    assert work.fencing_token == int(request.properties[DELIVERY_PROPERTY][2].rpartition(".")[2])
    work.pop_request()
    assert work.fencing_token == 0


def test_a_chord_is_not_failed_because_its_body_could_not_be_published(app: Celery, broker: Broker, epoch: str) -> None:
    work = app.tasks["work"]
    result = chord([work.s(), work.s()], work.s()).apply_async()
    deliveries = broker.fetch("a", epoch, 2).messages
    first, second = (as_run(message, [*("a", epoch), tag]) for tag, message in deliveries.items())
    held, (_, tag) = broker.keys.unacked("a", epoch), deliveries

    def end(request: Context) -> None:
        with ending(request):
            app.backend.on_chord_part_return(request, states.SUCCESS, None)

    end(first)
    broker.client.hdel(held, tag)
    with pytest.raises(EndNotStored, match="could not be published"):
        end(second)
    assert result.state == states.PENDING
    assert followers(broker) == []
    broker.client.hset(held, tag, deliveries[tag])
    end(second)
    assert followers(broker) == [result.id]


def as_run(message: bytes, delivery: list[str]) -> Context:
    """The request of the task that a message is for."""
    payload = json.loads(message)
    _, _, embedded = json.loads(base64.b64decode(payload["body"]))
    return Context({**payload["headers"], **embedded, "properties": {DELIVERY_PROPERTY: delivery}})
