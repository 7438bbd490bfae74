"""A job that a second node is given when the first is late: whoever is first ends it, and nothing is doubled."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chord
from celery.app.task import Context

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker.hedging import HEDGE_PROPERTY, Hedge
from cluster_tasks.broker.message import DELIVERY_PROPERTY, job_of
from cluster_tasks.broker.sequels import complete, ending
from cluster_tasks.errors import StaleCommit
from cluster_tasks.failover.evacuation import Remains
from cluster_tasks.redis_store import text
from tests.broker import Broker
from tests.waiting import wait_until

# Celery's own way to store a result that expires.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
SOON, LATER = 0.02, 60.0


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with Celery("hedges", set_as_current=False, broker=redis_url) as app:
        Cluster(app)

        @app.task(base=ClusterTask, shared=False, name="work", request_type="any", ignore_result=True)
        def work(*_: Any) -> None:
            """Nothing is run here."""

        yield app
        app.backend.client.connection_pool.disconnect()


class Nodes:
    """The nodes a, b and c, and what they do with a part of a chord that goes to a and is hedged to b."""

    def __init__(self, broker: Broker, app: Celery) -> None:
        self.broker, self.app = broker, app
        self.epochs = {node_id: broker.open(node_id) for node_id in "abc"}

    def send(self, after_s: float = SOON, second: str = "b", hedge: Any = None) -> str:
        """Send a chord of which one part is hedged, and end the other; return the id of the hedged part."""
        work = self.app.tasks["work"]
        hedged = work.s().set(queue="node.a", **{HEDGE_PROPERTY: hedge or Hedge(second, after_s, "work")})
        chord([work.s().set(queue="node.c"), hedged], work.s().set(queue="node.c", task_id="body")).apply_async()
        self.end(self.take("c"))
        return job_of(self.broker.client.lindex("node.a", 0))

    def fetch(self, node_id: str, want: int = 1) -> list[Context]:
        """Fetch as a node, and return the requests of the jobs."""
        fetched = self.broker.fetch(node_id, self.epochs[node_id], want)
        return [self._request(node_id, tag, message) for tag, message in fetched.messages.items()]

    def take(self, node_id: str) -> Context:
        return wait_until(lambda: self.fetch(node_id), message=f"{node_id} is given a job")[0]

    def _request(self, node_id: str, tag: str, message: bytes) -> Context:
        payload = json.loads(message)
        properties = {**payload["properties"], DELIVERY_PROPERTY: [node_id, self.epochs[node_id], tag]}
        *_, embedded = json.loads(base64.b64decode(payload["body"]))
        return Context({**payload["headers"], **embedded, "properties": properties})

    def commit(self, request: Context) -> None:
        """End a job, and count it for its chord."""
        self.app.backend.mark_as_done(request.id, None, request=request, store_result=False)

    def commit_and_no_more(self, request: Context) -> None:
        with ending(request):
            self.app.backend._end_without_result(request.id, None, "SUCCESS", None, request)

    def let_go(self, request: Context) -> None:
        node_id, epoch, tag = request.properties[DELIVERY_PROPERTY]
        self.broker.placer.let_go(self.broker.keys.unacked(node_id, epoch), {tag: request.id})

    def end(self, request: Context) -> None:
        self.commit(request)
        self.let_go(request)

    def lose(self, node_id: str) -> None:
        """Fence a node and give its jobs to others."""
        assert self.broker.epochs.fence(node_id, self.broker.epochs.beats()[node_id])
        self.broker.evacuation.move_remains(Remains(node_id, self.epochs[node_id]))

    def count(self, counter: str) -> int:
        return int(self.broker.client.hget(self.broker.keys.counters, counter) or 0)

    def check_that_it_was_ended_once(self, job: str) -> None:
        """All has come to its end: the body of the chord was sent once, and nothing is left that does not expire."""
        assert [request.id for request in self.fetch("c", 10)] == ["body"]
        assert [self.broker.held(node_id, self.epochs[node_id]) for node_id in "ab"] == [[], []]
        assert self.count("stale_commits") == 0
        client, keys = self.broker.client, self.broker.keys
        hedges = [name for node_id in "ab" for name in (keys.hedges(node_id), keys.hedged(node_id))]
        assert not client.exists(keys.kept_end(job), *hedges, keys.crashes(job))
        (done,) = client.keys("celery-taskset-meta-*")
        assert text(done).endswith(".c")
        # The result backend notes for a while what was counted.
        assert all(client.ttl(key) > 0 for key in (done, keys.terminal(job)))


@pytest.fixture
def nodes(broker: Broker, app: Celery) -> Nodes:
    return Nodes(broker, app)


def durations(broker: Broker) -> list[float]:
    found: Any = broker.client.lrange(broker.keys.durations("work"), 0, -1)
    return list(map(float, found))


def test_a_job_that_ends_in_time_takes_back_its_hedge(nodes: Nodes, broker: Broker) -> None:
    job = nodes.send(LATER)
    assert broker.client.zcard(broker.keys.hedges("b")) == broker.client.hlen(broker.keys.hedged("b")) == 1
    request = nodes.take("a")
    assert nodes.fetch("b") == []
    nodes.end(request)
    nodes.check_that_it_was_ended_once(job)
    assert (nodes.count("hedges"), nodes.fetch("b")) == (0, [])
    assert 0 < broker.client.ttl(broker.keys.terminal(job)) <= 300
    (took_s,) = durations(broker)
    assert 0 < took_s < LATER


@pytest.mark.parametrize("first", ["the first node", "the second node"])
def test_of_two_nodes_that_do_a_job_the_first_ends_it_and_the_other_has_not_failed(
    first: str, nodes: Nodes, broker: Broker
) -> None:
    job = nodes.send()
    slow, hedge = nodes.take("a"), nodes.take("b")
    assert slow.id == hedge.id == job
    assert (nodes.count("hedges"), nodes.fetch("b"), nodes.fetch("c")) == (1, [], [])
    winner, loser = (slow, hedge) if first == "the first node" else (hedge, slow)
    nodes.end(winner)
    nodes.end(loser)
    nodes.check_that_it_was_ended_once(job)
    # The loser may be stopped for longer than the end of other jobs is remembered.
    assert broker.client.ttl(broker.keys.terminal(job)) > 3600
    (took_s,) = durations(broker)
    assert took_s >= SOON


def test_a_second_node_does_its_other_work_first_and_nobody_else_is_given_the_hedge(
    nodes: Nodes, broker: Broker
) -> None:
    job = nodes.send()
    nodes.take("a")
    wait_until(lambda: _is_due(broker, job))
    broker.publish("other", "b")
    assert [request.id for request in nodes.fetch("b")] == ["other"]
    assert nodes.fetch("c", 5) == nodes.fetch("a", 5) == []
    assert [request.id for request in nodes.fetch("b", 5)] == [job]


def _is_due(broker: Broker, job: str) -> bool:
    seconds, micros = broker.client.time()
    due: Any = broker.client.zscore(broker.keys.hedges("b"), job)
    return bool(seconds + micros / 1e6 > due)


def test_who_took_a_job_from_the_list_of_the_first_node_is_not_given_it_again(nodes: Nodes, broker: Broker) -> None:
    job = nodes.send()
    wait_until(lambda: _is_due(broker, job))
    (taken,) = nodes.fetch("b", 5)
    assert nodes.fetch("b", 5) == []
    nodes.end(taken)
    nodes.check_that_it_was_ended_once(job)
    assert nodes.count("hedges") == 0


@pytest.mark.parametrize("first", ["who took it", "the first node"])
def test_who_took_a_job_that_it_was_to_hedge_is_hedged_by_the_first_node(
    first: str, nodes: Nodes, broker: Broker
) -> None:
    job = nodes.send()
    (taken,) = nodes.fetch("b")
    hedge = nodes.take("a")
    assert taken.id == hedge.id == job
    assert (nodes.count("hedges"), nodes.fetch("b", 5), nodes.fetch("c")) == (1, [], [])
    winner, loser = (taken, hedge) if first == "who took it" else (hedge, taken)
    nodes.end(winner)
    nodes.end(loser)
    nodes.check_that_it_was_ended_once(job)


def test_who_took_a_job_that_it_was_to_hedge_and_ends_it_in_time_takes_the_hedge_back(
    nodes: Nodes, broker: Broker
) -> None:
    job = nodes.send(LATER)
    (taken,) = nodes.fetch("b")
    assert broker.client.zcard(broker.keys.hedges("a")) == broker.client.hlen(broker.keys.hedged("a")) == 1
    nodes.end(taken)
    nodes.check_that_it_was_ended_once(job)
    assert (nodes.count("hedges"), nodes.fetch("a")) == (0, [])
    assert 0 < broker.client.ttl(broker.keys.terminal(job)) <= 300


def test_the_end_of_a_node_that_dies_before_it_counts_its_part_is_counted_by_the_loser(nodes: Nodes) -> None:
    job = nodes.send()
    slow, hedge = nodes.take("a"), nodes.take("b")
    nodes.commit_and_no_more(hedge)
    nodes.end(slow)
    nodes.lose("b")
    again = nodes.take("a")
    complete(nodes.app.backend, again)
    nodes.let_go(again)
    nodes.broker.client.delete(nodes.broker.keys.crashes(job))  # As a node does with what has ended.
    nodes.check_that_it_was_ended_once(job)


def test_a_node_that_is_lost_commits_nothing_whoever_ended_its_job(nodes: Nodes) -> None:
    job = nodes.send()
    slow, hedge = nodes.take("a"), nodes.take("b")
    nodes.lose("a")
    with pytest.raises(StaleCommit, match="its delivery was taken away"):
        nodes.commit(slow)
    nodes.end(hedge)
    with pytest.raises(StaleCommit, match="its delivery was taken away"):
        nodes.commit(slow)
    assert nodes.count("stale_commits") == 2
    assert nodes.broker.client.exists(nodes.broker.keys.terminal(job))


def test_a_job_whose_nodes_both_die_is_done_by_a_third(nodes: Nodes) -> None:
    job = nodes.send()
    nodes.take("a"), nodes.take("b")
    nodes.lose("a")
    nodes.lose("b")
    first = nodes.take("c")
    nodes.end(first)
    second = nodes.take("c")
    assert first.id == second.id == job
    nodes.end(second)
    nodes.broker.client.delete(nodes.broker.keys.crashes(job))
    assert nodes.count("stale_commits") == 0
    assert [request.id for request in nodes.fetch("c", 10)] == ["body"]


def test_a_part_that_is_revoked_fails_its_chord_once(nodes: Nodes, app: Celery) -> None:
    nodes.send()
    for request in (nodes.take("a"), nodes.take("b")):
        app.backend.mark_as_revoked(request.id, "revoked", request=request, store_result=False)
        nodes.let_go(request)
    assert nodes.count("stale_commits") == 0
    assert app.AsyncResult("body").state == "FAILURE"
    assert nodes.fetch("c", 10) == []


@pytest.mark.parametrize("why", ["it drains", "it is no more"])
def test_a_node_that_may_not_work_is_kept_no_hedge(why: str, nodes: Nodes, broker: Broker) -> None:
    if why == "it drains":
        broker.epochs.set_draining("b", True)
    else:
        nodes.lose("b")
    nodes.send()
    assert not broker.client.keys("cluster:hedge*")


def test_what_is_purged_leaves_nothing_that_does_not_expire(nodes: Nodes, broker: Broker) -> None:
    nodes.send()
    assert all(0 < broker.client.ttl(key) <= 60 for key in (broker.keys.hedges("b"), broker.keys.hedged("b")))


@pytest.mark.parametrize(
    "given", [["b"], ["../b", 1.0, "x"], ["b", "soon", "x"], ["b", -1, "x"], 7, ["b", 1, "\ud800"]]
)
def test_a_job_that_does_not_say_rightly_how_it_is_hedged_is_not(given: Any, nodes: Nodes, broker: Broker) -> None:
    nodes.send(hedge=given)
    nodes.end(nodes.take("a"))
    assert not broker.client.keys("cluster:hedge*")
