"""What a fetch brings along with a job, to be done in one call with it."""

from __future__ import annotations

import json

import pytest

from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.message import BATCH_PROPERTY
from cluster_tasks.clock import ManualClock
from cluster_tasks.failover.evacuation import Remains
from tests.broker import Broker, make_message


@pytest.fixture
def epoch(broker: Broker) -> str:
    return broker.open("a")


@pytest.fixture
def node(broker: Broker, epoch: str) -> Deliveries:
    """A node with two places."""
    node = Deliveries("a", (), broker.keys, broker.client, ManualClock(), lambda: 2)
    node.begin(epoch)
    node.renew(1e9)
    return node


def put(broker: Broker, jobs: str, batch: str = "4 work", **more: object) -> None:
    for job in jobs:
        broker.put(make_message(job, **{BATCH_PROPERTY: batch, **more}), "node.a")


def test_a_place_is_filled_with_what_follows_and_says_the_same(broker: Broker, epoch: str) -> None:
    put(broker, "abcdef")
    assert [broker.fetch("a", epoch).places for _ in range(3)] == [["abcd"], ["ef"], []]
    assert sorted(broker.held("a", epoch)) == list("abcdef")
    assert not broker.client.zcard(broker.keys.backlog)


def test_nothing_overtakes_what_cannot_be_done_with_others(broker: Broker, epoch: str) -> None:
    put(broker, "ab")
    put(broker, "c", "4 other")
    put(broker, "d", "")
    put(broker, "ef")
    broker.publish("g", "a")
    put(broker, "h")
    assert [broker.fetch("a", epoch).places for _ in range(6)] == [["ab"], ["c"], ["d"], ["ef"], ["g"], ["h"]]


def test_what_is_more_urgent_is_not_done_with_what_is_less(broker: Broker, epoch: str) -> None:
    put(broker, "ab", priority=9)
    put(broker, "cd", priority=0)
    assert [broker.fetch("a", epoch).places for _ in range(2)] == [["cd"], ["ab"]]


def test_what_waits_is_shared_by_all_free_places(broker: Broker, epoch: str) -> None:
    put(broker, "abcdef")
    assert broker.fetch("a", epoch, want=2).places == ["acd", "bef"]


def test_no_place_takes_what_an_idle_node_can_do_now(broker: Broker, epoch: str) -> None:
    others = {node_id: broker.open(node_id) for node_id in "bc"}
    for node_id, its in others.items():
        assert not broker.fetch(node_id, its).jobs
    put(broker, "abcd")
    assert broker.fetch("a", epoch).places == ["ab"]
    assert [broker.fetch(node_id, its).places for node_id, its in others.items()] == [["c"], ["d"]]


def test_a_node_that_takes_from_another_takes_them_together(broker: Broker, epoch: str) -> None:
    put(broker, "abcdef")
    assert broker.fetch("b", broker.open("b")).places == ["abcd"]
    assert broker.listed("node.a") == ["e", "f"]


def test_large_messages_are_not_handed_over_at_once(broker: Broker, epoch: str) -> None:
    put(broker, "abc", padding="x" * 100_000)
    assert broker.fetch("a", epoch).places == ["ab"]


def test_each_is_a_delivery_of_its_own(broker: Broker, epoch: str) -> None:
    put(broker, "abc")
    first, second, _ = broker.fetch("a", epoch).messages
    broker.fetch("a", epoch, want=0, acked=[second])
    assert sorted(broker.held("a", epoch)) == ["a", "c"]
    assert broker.job_held("a", epoch, first) == "a"


def test_a_node_counts_places_and_not_jobs(broker: Broker, node: Deliveries, epoch: str) -> None:
    put(broker, "abcdef")
    assert node.free_slots() == 2
    _, first_tag, acked = node.next_fetch()
    fetched = broker.fetch("a", epoch, first_tag=first_tag)
    node.receive(list(fetched.messages.items()), acked, beside=fetched.beside)
    assert (node.held(), node.free_slots()) == (4, 1)
    tags = list(fetched.messages)
    node.put_alone(tags[1])
    assert node.free_slots() == 0
    node.put_beside(tags[1])
    for tag in tags[1:]:
        node.ack(tag)
    assert (node.held(), node.free_slots()) == (1, 1)
    node.ack(tags[0])
    assert (node.held(), node.free_slots()) == (0, 2)


def test_what_the_headers_of_a_job_are_called_brings_nothing_along(broker: Broker, epoch: str) -> None:
    for job in "abc":
        message = json.loads(make_message(job))
        # A header, and a stamp, of a user.
        message["headers"].update(batch="2024 nightly", stamps={"batch": "2024 nightly"})
        broker.put(json.dumps(message).encode(), "node.a")
    assert [broker.fetch("a", epoch).places for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_a_job_that_was_with_a_node_before_fills_a_place_by_itself(broker: Broker, epoch: str) -> None:
    put(broker, "a")
    assert broker.fetch("a", epoch).jobs == ["a"]
    put(broker, "bcd")
    broker.epochs.close("a", epoch)
    broker.evacuation.move_remains(Remains("a", epoch))
    assert broker.waiting() == list("abcd")
    epoch = broker.open("a")
    assert [broker.fetch("a", epoch).places for _ in range(2)] == [["a"], ["bcd"]]
