"""One message of many jobs: each ends once, by the delivery that stands, and goes on alone after a crash."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery, signals
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.exceptions import TaskRevokedError
from kombu.compression import compress

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.members import named, split
from cluster_tasks.broker.message import DELIVERY_PROPERTY, Delivery
from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import StaleCommit
from tests.broker import Broker, make_members
from workers.members import trace_members

IDS = ["one", "two", "three"]
CRASH = Crash("a", "1-x", "it died", 1.0)


@pytest.fixture(params=[0, 5], ids=["results beside jobs", "results in another database"])
def app(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Celery]:
    backend = redis_url.removesuffix("/0") + f"/{request.param}"
    with Celery("members", set_as_current=False, broker=redis_url, backend=backend) as app:
        Cluster(app)
        yield app
        app.backend.client.connection_pool.disconnect()


@pytest.fixture
def epoch(broker: Broker) -> str:
    return broker.open("a")


def take(broker: Broker, epoch: str, node_id: str = "a", message: bytes = b"") -> Context:
    """Let a node fetch a message of three jobs; return its request."""
    if message:
        broker.put(message)
    (tag,) = broker.fetch(node_id, epoch).messages
    properties = {DELIVERY_PROPERTY: [node_id, epoch, tag]}
    return Context({"id": "message", "members": named(IDS), "properties": properties, "delivery_info": {}})


def delivery_of(request: Context) -> Delivery:
    delivery = Delivery.of(request.properties)
    assert delivery is not None
    return delivery


def request_of(request: Context, job_id: str) -> Context:
    return Context({**vars(request), "id": job_id, "members": None})


def stale(broker: Broker) -> int:
    return int(broker.client.hget(broker.keys.counters, "stale_commits") or 0)


def states(app: Celery) -> list[str]:
    return [app.AsyncResult(job_id).state for job_id in IDS]


def test_the_ends_of_the_members_and_of_their_delivery_are_one_step(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, message=make_members(IDS))
    for _ in range(2):  # A reply that was lost makes Celery repeat it.
        with app.backend.ends_together(delivery_of(request), "message") as ends:
            for number, job_id in enumerate(IDS):
                app.backend.mark_as_done(job_id, number, request=request_of(request, job_id))
            ends.tell(last=True)
        assert [app.AsyncResult(job_id).result for job_id in IDS] == [0, 1, 2]
        assert not broker.held("a", epoch)
    assert stale(broker) == 0
    lives = [broker.client.ttl(broker.keys.terminal(job_id)) for job_id in [*IDS, "message"]]
    assert all(0 < left <= 24 * 3600 for left in lives)


def test_a_fenced_node_ends_no_member(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, message=make_members(IDS))
    broker.epochs.fence("a", broker.epochs.beats()["a"])
    with app.backend.ends_together(delivery_of(request), "message") as ends:
        app.backend.mark_as_done("one", 1, request=request_of(request, "one"))
        with pytest.raises(StaleCommit, match="their delivery was taken away"):
            ends.tell(last=True)
    assert states(app) == ["PENDING"] * 3


def test_a_member_that_had_ended_keeps_its_end_and_the_others_get_theirs(
    broker: Broker, app: Celery, epoch: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker.put(make_members(IDS))
    app.backend.mark_as_revoked("two", "revoked")
    request = take(broker, epoch)
    with app.backend.ends_together(delivery_of(request), "message") as ends:
        for job_id in IDS:
            app.backend.mark_as_done(job_id, 1, request=request_of(request, job_id))
        ends.tell(last=True)
    assert states(app) == ["SUCCESS", "REVOKED", "SUCCESS"]
    assert "result SUCCESS of job two refused: it had ended before" in caplog.text


def test_that_a_member_has_ended_is_known_for_as_long_as_its_message_is_worked_on(
    broker: Broker, app: Celery, epoch: str
) -> None:
    request = take(broker, epoch, message=make_members(IDS))
    marker = broker.keys.terminal("one")
    with app.backend.ends_together(delivery_of(request), "message") as ends:
        app.backend.mark_as_done("one", 1, request=request_of(request, "one"), store_result=False)
        ends.tell()
        assert broker.client.ttl(marker) > 300
        assert broker.held("a", epoch)
        ends.tell(last=True)
    assert 0 < broker.client.ttl(marker) <= 300
    assert not broker.held("a", epoch)


def test_large_results_do_not_wait_for_each_other(broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, message=make_members(IDS))
    with app.backend.ends_together(delivery_of(request), "message"):
        app.backend.mark_as_done("one", "x" * (1 << 20), request=request_of(request, "one"))
        assert states(app) == ["SUCCESS", "PENDING", "PENDING"]


@pytest.mark.parametrize("how", ["failed", "revoked"])
def test_the_end_of_a_message_is_that_of_all_its_members(how: str, broker: Broker, app: Celery, epoch: str) -> None:
    request = take(broker, epoch, message=make_members(IDS))
    if how == "failed":
        app.backend.mark_as_failure("message", ValueError("nobody knows the task"), request=request)
    else:
        app.backend.mark_as_revoked("message", "terminated", request=request)
    assert states(app) == ["FAILURE" if how == "failed" else "REVOKED"] * 3
    with pytest.raises(ValueError if how == "failed" else TaskRevokedError):
        app.AsyncResult("two").get(timeout=10)
    assert app.AsyncResult("message").state == "PENDING"
    assert not broker.held("a", epoch)


def test_a_member_of_what_another_node_holds_is_not_ended_by_a_revocation(
    broker: Broker, app: Celery, epoch: str
) -> None:
    take(broker, epoch, message=make_members(IDS))
    app.backend.mark_as_revoked("two", "revoked")
    assert states(app) == ["PENDING"] * 3


# After a crash.


@pytest.fixture
def node(broker: Broker) -> Deliveries:
    made = Deliveries("c", ["llm"], broker.keys, broker.client, ManualClock(), lambda: 5)
    made.begin(broker.open("c", "llm"))
    return made


def hold(broker: Broker, node: Deliveries, message: bytes) -> str:
    """Have a node hold a message; return the tag of its delivery."""
    broker.put(message)
    messages = broker.fetch(node.node_id, node.epoch, serves=["llm"]).messages
    node.receive(list(messages.items()), ())
    (tag,) = messages
    return tag


def test_members_of_a_message_that_crashed_go_on_alone_as_suspects_in_their_order(
    broker: Broker, node: Deliveries
) -> None:
    tag = hold(broker, node, make_members(IDS, request_type="llm"))
    broker.client.rpush(broker.keys.crashes("message"), str(CRASH))
    assert node.split(tag, "message", CRASH) == 3
    assert broker.listed(broker.keys.suspect_queue("llm")) == IDS
    assert broker.epochs.lengths() == {broker.keys.suspect_queue("llm"): 3}
    assert (node.held(), broker.held("c", node.epoch)) == (0, [])
    for job_id in IDS:
        (record,) = broker.client.lrange(broker.keys.crashes(job_id), 0, -1)
        assert Crash.read(record) == replace(CRASH, shared=True)
    assert not broker.client.exists(broker.keys.crashes("message"))


def test_members_that_were_only_taken_from_their_node_go_on_uncharged_before_what_waits(
    broker: Broker, node: Deliveries
) -> None:
    tag = hold(broker, node, make_members(IDS, request_type="llm"))
    broker.publish("later", request_type="llm")
    assert node.split(tag, "message", None) == 3
    assert broker.waiting("llm") == [*IDS, "later"]
    assert not any(broker.client.exists(broker.keys.crashes(job_id)) for job_id in IDS)


def test_what_has_ended_or_is_on_its_way_as_its_own_retry_does_not_go_on(broker: Broker, node: Deliveries) -> None:
    tag = hold(broker, node, make_members(IDS, request_type="llm"))
    marker = broker.keys.terminal("one")
    broker.client.set(marker, f"{tag} SUCCESS 300", ex=10_000)
    broker.client.sadd(broker.keys.followed("three"), "three/0.1")
    assert node.split(tag, "message", CRASH) == 1
    assert broker.listed(broker.keys.suspect_queue("llm")) == ["two"]
    assert not broker.client.exists(broker.keys.crashes("one"), broker.keys.crashes("three"))
    assert 0 < broker.client.ttl(marker) <= 300


def test_a_message_is_split_once(broker: Broker, node: Deliveries) -> None:
    message = make_members(IDS, request_type="llm")
    tag = hold(broker, node, message)
    assert node.split(tag, "message", CRASH) == 3
    node.receive([(tag, message)], ())
    assert node.split(tag, "message", CRASH) == -1
    assert broker.client.llen(broker.keys.crashes("one")) == 1
    assert broker.epochs.lengths() == {broker.keys.suspect_queue("llm"): 3}


def test_each_message_of_a_split_one_is_that_of_a_job_of_its_own() -> None:
    for job_id, payload in zip(IDS, split(make_members(IDS)), strict=True):
        headers, properties = payload["headers"], payload["properties"]
        assert (headers["id"], headers["root_id"], headers["task"]) == (job_id, job_id, "jobs.work")
        assert "members" not in headers
        assert properties["correlation_id"] == job_id
        assert properties["delivery_info"]["redelivered"]
        assert json.loads(b64decode(payload["body"]))[:2] == [[job_id], {}]
    assert len({payload["properties"]["delivery_tag"] for payload in split(make_members(IDS))}) == 3


@pytest.mark.parametrize(
    "change",
    [{"body": "&"}, {"content-type": "application/x-python-serialize"}, {"headers": {"members": 5, "id": "a"}}],
)
def test_what_cannot_be_split_says_so(change: dict[str, Any]) -> None:
    message = {**json.loads(make_members(IDS)), **change}
    with pytest.raises(ValueError, match="cannot be read"):
        split(json.dumps(message).encode())


def test_what_is_too_large_when_it_is_unpacked_is_not_split() -> None:
    message = json.loads(make_members(IDS))
    body = b64decode(message["body"])
    packed, message["headers"]["compression"] = compress(body, "zlib")
    message["body"] = b64encode(packed).decode()
    assert len(split(json.dumps(message).encode(), len(body))) == 3
    with pytest.raises(ValueError, match=r"more than \d+ bytes"):
        split(json.dumps(message).encode(), len(body) - 1)


@pytest.mark.filterwarnings("ignore:Exception raised outside body")
@pytest.mark.parametrize("how", ["each alone", "together"])
@pytest.mark.parametrize("meanwhile", ["fenced", "revoked"])
def test_no_success_is_told_that_is_not_committed(
    how: str, meanwhile: str, broker: Broker, app: Celery, epoch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose() -> None:
        if meanwhile == "fenced":
            broker.epochs.fence("a", broker.epochs.beats()["a"])
        else:
            broker.client.set(broker.keys.terminal("two"), "revoked")

    def both(app: Celery, calls: list[Any]) -> list[str]:
        lose()
        return ["done"] * len(calls)

    @app.task(base=ClusterTask, name="work", shared=False, together=both if how == "together" else None)
    def work() -> str:
        if how != "together":
            lose()
        return "done"

    told = list[str]()
    monkeypatch.setattr(signals.task_success, "receivers", [])
    signals.task_success.connect(lambda sender, **_: told.append(sender.request.id), weak=False)
    request = vars(take(broker, epoch, message=make_members(IDS)))
    app.set_current()
    app.finalize()
    work.__trace__ = build_tracer("work", work, app=app)
    code, *_ = trace_members("work", "message", {**request, "task": "work"}, ([[(), {}]] * 3, {}, {}), "", "")
    assert (code, told) == ((1, []) if meanwhile == "fenced" else (0, ["one", "three"]))
