"""The channel of a node, driven as Kombu's poller drives it."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest
from celery import Celery
from kombu import Consumer

from cluster_tasks import Cluster
from cluster_tasks.broker import deliveries
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.placement import fetching_script
from cluster_tasks.clock import ManualClock
from cluster_tasks.router import cluster_queue
from tests.broker import Broker
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
