"""A publish whose reply is lost is repeated by Celery, and places its job once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker.delays import delayed_jobs
from cluster_tasks.broker.message import place_message
from cluster_tasks.broker.publishing import begin_publish, end_publish
from cluster_tasks.errors import InvalidQueue
from tests.broker import Broker, make_message
from tests.process.proxy import Wire, wire_to
from workers.redis_server import RedisServer


@pytest.fixture
def wire(redis_server: RedisServer) -> Iterator[Wire]:
    with wire_to(redis_server.port) as wire:
        yield wire


@contextmanager
def producer(url: str, **settings: Any) -> Iterator[Any]:
    """A task of an app whose Redis is there."""
    with Celery("producer", set_as_current=False, broker=url) as app:
        app.conf.update(settings)
        Cluster(app)

        @app.task(base=ClusterTask, name="jobs.work", request_type="llm", ignore_result=True, shared=False)
        def work() -> None:
            """Nothing: no node runs it."""

        yield work


@pytest.mark.parametrize("options", [{}, {"countdown": 60}, {"priority": 9}])
def test_a_publish_whose_reply_was_lost_places_its_job_once(
    options: dict[str, int], broker: Broker, wire: Wire
) -> None:
    with producer(wire.url) as work:
        sent = [work.apply_async(**options).id]  # Connections and scripts are there.
        for _ in range(8):
            # The router reads over this wire as well, and may lose a reply instead.
            wire.cut_replies(2)
            sent.append(work.apply_async(**options).id)
    assert wire.cut >= 8
    assert sorted(broker.waiting("llm") + delayed(broker)) == sorted(sent)


def delayed(broker: Broker) -> list[str]:
    return [job.payload["headers"]["id"] for job in delayed_jobs(broker.client, broker.keys, 100)]


@pytest.mark.parametrize("timezone", ["UTC", "Europe/Berlin"])
def test_a_time_that_names_no_zone_is_one_of_utc_as_it_is_to_celerys_workers(
    timezone: str, broker: Broker, redis_server: RedisServer
) -> None:
    eta = datetime.now(UTC) + timedelta(hours=1)
    with producer(redis_server.url, timezone=timezone) as work:
        for given in (eta, eta.replace(tzinfo=None)):
            work.apply_async(eta=given)
    assert [job.due for job in delayed_jobs(broker.client, broker.keys, 100)] == [
        pytest.approx(eta.timestamp(), abs=1)
    ] * 2


def test_a_try_that_arrives_after_its_repetition_and_a_later_publish_changes_nothing(broker: Broker) -> None:
    first, second = (place_message({}, make_message(job), broker.keys) for job in ("first", "second"))
    repeated = begin_publish()
    assert broker.placer.publish(first, repeated, None, 1.0)
    end_publish(repeated)
    assert broker.placer.publish(second, begin_publish(), None, 1.0)
    assert not broker.placer.publish(first, repeated, None, 1.0)
    assert broker.waiting() == ["first", "second"]


def test_a_publish_that_begins_while_another_is_under_way_may_be_done_before_it(broker: Broker) -> None:
    # By a thread, by a greenlet, or by the handler of a signal.
    first, second = (place_message({}, make_message(job), broker.keys) for job in ("first", "second"))
    outer, inner = begin_publish(), begin_publish()
    assert broker.placer.publish(second, inner, None, 1.0)
    assert broker.placer.publish(first, outer, None, 1.0)
    assert broker.waiting() == ["second", "first"]


@pytest.mark.parametrize(
    "queue",
    [
        *("node.a\nb", "node.a b", "node.", "node.a.bound.bound", "node.a\nb.bound"),
        *("cluster.delayed", "cluster:epochs", "cluster:bell:node.a", "cluster:anything"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"countdown": 60}])
def test_no_job_is_sent_to_a_queue_that_can_be_none(
    queue: str, options: dict[str, int], broker: Broker, redis_server: RedisServer
) -> None:
    message: dict[str, Any] = json.loads(make_message("1"))
    with producer(redis_server.url) as work:
        with pytest.raises(InvalidQueue, match="no job can be sent to"):
            work.apply_async(queue=queue, **options)
        with work.app.connection_for_write() as connection, pytest.raises(InvalidQueue):
            connection.default_channel.basic_publish(message, exchange="", routing_key=queue)
        assert list(broker.client.scan_iter()) == []
        # Queues of the users are theirs to name.
        for own in ("cluster", "cluster.delayed.2", "my\nqueue", "nodes.a b"):
            work.apply_async(queue=own)
            assert broker.client.llen(own) == 1


def test_the_names_of_another_cluster_are_not_refused(broker: Broker, redis_server: RedisServer) -> None:
    with Celery("producer", set_as_current=False, broker=redis_server.url) as app:
        app.conf.cluster_name = "other"
        Cluster(app)
        with pytest.raises(InvalidQueue):
            app.send_task("jobs.work", queue="other.delayed", ignore_result=True)
        with pytest.raises(InvalidQueue):
            app.send_task("jobs.work", queue="other.node.a\nb", ignore_result=True)
        app.send_task("jobs.work", queue="cluster.delayed.2", ignore_result=True)


FORKED_BY_C = """
import ctypes, os
from cluster_tasks.broker.publishing import begin_publish, end_publish

end_publish(begin_publish())
child = ctypes.CDLL(None).fork()
# In one write: that of the other process comes before it or after it.
os.write(1, begin_publish().producer.encode() + b" ")
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""


def test_a_process_that_python_did_not_fork_is_another_producer() -> None:
    # uWSGI calls fork by itself, and no hook of Python is run.
    ran = subprocess.run([sys.executable, "-c", FORKED_BY_C], capture_output=True, text=True, check=True)
    assert len(set(ran.stdout.split())) == 2


def test_a_forked_process_is_another_producer() -> None:
    end_publish(begin_publish())
    mine = begin_publish()
    end_publish(mine)
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, begin_publish().producer.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100).decode() != mine.producer == begin_publish().producer
    os.close(read)
    os.close(write)
