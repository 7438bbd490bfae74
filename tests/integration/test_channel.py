"""The channel of a node, driven as Kombu's poller drives it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from queue import Empty
from typing import Any

import pytest
from celery import Celery
from kombu import Consumer, Queue

from cluster_tasks import Cluster
from cluster_tasks.broker import channel as channel_module
from cluster_tasks.broker import deliveries
from cluster_tasks.broker.channel import IDLE_WAIT_S
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.hedging import Hedge
from cluster_tasks.broker.message import place_message
from cluster_tasks.broker.placement import fetching_script
from cluster_tasks.broker.publishing import Publish
from cluster_tasks.clock import ManualClock
from cluster_tasks.router import cluster_queue
from tests.broker import Broker, make_message
from tests.waiting import wait_until
from workers.redis_server import RedisServer


@pytest.fixture
def node(broker: Broker) -> Iterator[Deliveries]:
    """This process, as a node of four slots."""
    register = Deliveries("a", (), broker.keys, broker.client, ManualClock(), lambda: 4)
    register.begin(broker.open("a"))
    register.renew(10)
    deliveries.install(register)
    yield register
    deliveries.install(None)


@pytest.fixture
def consumer(node: Deliveries, redis_server: RedisServer) -> Iterator[Any]:
    """A consumer of its list, whose channel has a connection."""
    with Celery("node", set_as_current=False, broker=redis_server.url) as app:
        Cluster(app)
        with app.connection_for_read() as connection:
            channel = connection.channel()
            made = Consumer(channel, [cluster_queue(node.queue)], on_message=lambda message: None)
            made.consume()
            channel.client.connection = channel.client.connection_pool.get_connection()
            channel.client.script_load(fetching_script())
            yield made


def test_what_a_fetch_brings_after_its_consumer_was_cancelled_goes_to_others(
    broker: Broker, node: Deliveries, consumer: Any
) -> None:
    for job in ("first", "second"):
        broker.publish(job, "a")
    channel = consumer.channel
    channel._brpop_start()
    consumer.cancel_by_queue(node.queue)
    wait_until(lambda: len(broker.held("a", node.epoch)) == 2, 10, "the fetch is done")
    with pytest.raises(Empty):
        channel._brpop_read()
    assert (broker.held("a", node.epoch), node.held()) == ([], 0)
    fetched = broker.fetch("b", broker.open("b"), want=4)
    assert fetched.jobs == ["first", "second"]
    assert not broker.client.keys("cluster:crashes:*")


def test_a_node_that_is_to_do_a_job_later_as_well_waits_until_then_and_does_not_take_it_from_the_first(
    broker: Broker, node: Deliveries, consumer: Any
) -> None:
    channel = consumer.channel
    turn(channel)
    broker.fetch("b", broker.open("b"))
    message = make_message("job")
    placement = place_message(json.loads(message), message, broker.keys, "node.b")
    assert broker.placer.publish(placement, Publish("producer", 1), None, IDLE_WAIT_S, Hedge("a", 0.05, "tests"))
    assert broker.rings("a") == broker.rings("b") == 1
    assert turn(channel) == turn(channel) == "bell"
    assert broker.listed("node.b") == ["job"]
    # Its time has come, and nobody has taken it.
    assert turn(channel) == "fetch"
    assert broker.held("a", node.epoch) == ["job"]


def test_an_idle_node_waits_on_at_its_doorbell_and_fetches_now_and_then(
    broker: Broker, node: Deliveries, consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "BELL_WAIT_S", 0.05)
    monkeypatch.setattr(channel_module, "IDLE_WAIT_S", 3.0)
    channel = consumer.channel
    assert turn(channel) == "fetch"
    waits = takewhile(lambda command: command == "bell", iter(lambda: turn(channel), ""))
    assert sum(1 for _ in waits) > 1
    # That one fetched: the next job rings.
    assert broker.idle() == ["node.a"]
    broker.publish("job", "a")
    assert (turn(channel), turn(channel)) == ("bell", "fetch")
    assert broker.held("a", node.epoch) == ["job"]


def test_a_busy_node_that_glances_at_other_queues_fetches_on(
    broker: Broker, node: Deliveries, consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "GLANCE_EVERY_S", 0)
    consumer.add_queue(Queue("others"))
    consumer.consume()
    for number in range(8):
        broker.publish(f"job{number}", "a")
    channel = consumer.channel
    assert turn(channel) == "fetch"
    for tag in node.delivered():
        node.ack(tag)
    assert (turn(channel), turn(channel)) == ("glance", "fetch")
    assert len(broker.held("a", node.epoch)) == 4


def turn(channel: Any) -> str:
    """Let the channel do what comes next; return what that was."""
    channel._brpop_start()
    command = str(channel._under_way)
    with suppress(Empty):
        channel._brpop_read()
    return command
