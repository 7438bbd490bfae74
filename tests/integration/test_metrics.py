"""The metrics on a real Redis: counted once, read in few round trips, in time when it is away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from prometheus_client import CollectorRegistry, generate_latest

from cluster_tasks import Cluster
from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.breaker import Outcome as Ending
from cluster_tasks.broker.epochs import Limit
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.gateway.shared import Limits, SharedBreaker
from cluster_tasks.metrics.counts import RETOLD_S, Counts, Outcome, Teller
from tests.broker import Broker
from tests.exposition import RULES, Samples, parse, value
from tests.servers import missing

NewCluster = Callable[[str], Cluster]


@pytest.fixture
def new_cluster() -> Iterator[NewCluster]:
    """Make the callers' side of a cluster at a URL."""
    apps = []

    def new(url: str) -> Cluster:
        app = Celery("observer", broker=url, set_as_current=False)
        apps.append(app)
        return Cluster(app)

    yield new
    for app in apps:
        app.close()


def scrape(cluster: Cluster) -> Samples:
    registry = CollectorRegistry()
    registry.register(cluster.metrics)
    return parse(generate_latest(registry).decode())


class LosesReplies(redis.Redis):
    """A client whose connection breaks where a reply should come, when it is told to."""

    is_losing = False

    def execute_command(self, *args: Any, **options: Any) -> Any:
        reply = super().execute_command(*args, **options)
        if self.is_losing:
            raise redis.ConnectionError("the reply was lost")
        return reply


def test_a_batch_counts_once_although_its_reply_was_lost(broker: Broker, redis_url: str) -> None:
    counts = Counts()
    with LosesReplies.from_url(redis_url) as client:
        teller = Teller(client, broker.keys, "a", counts)
        teller.tell({}, 0.0)
        counts.ended("llm", Outcome.SUCCEEDED, 1.0, 1.0)
        client.is_losing = True
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                teller.tell({"llm": 1}, 0.0)
        counts.ended("llm", Outcome.SUCCEEDED, 1.0, 1.0)
        client.is_losing = False
        for _ in range(3):
            teller.tell({"llm": 2}, 0.0)
    for key in (broker.keys.job_counts, broker.keys.node_counts("a")):
        assert broker.client.hget(key, "llm ended succeeded") == b"2"
        assert broker.client.hget(key, "llm run us") == b"2000000"
    assert broker.client.hget(broker.keys.node_counts("a"), "llm held") == b"2"


def test_what_a_node_holds_no_more_is_told_and_nothing_is_told_without_news(broker: Broker) -> None:
    teller, key = Teller(broker.client, broker.keys, "a", Counts()), broker.keys.node_counts("a")
    teller.tell({"llm": 2}, 0.0)
    teller.tell({}, 1.0)
    assert broker.client.hget(key, "llm held") == b"0"
    broker.client.delete(key)
    teller.tell({}, 2.0)
    assert not broker.client.exists(key)
    teller.tell({}, 1.0 + RETOLD_S)
    assert broker.client.hget(key, "llm held") == b"0", "a Redis that has forgotten it is told again"


def test_sums_stay_when_a_node_goes_and_its_own_numbers_go_with_it(
    broker: Broker, redis_url: str, new_cluster: NewCluster
) -> None:
    cluster, counts = new_cluster(redis_url), Counts()
    epochs = {node_id: broker.epochs.open(node_id, ["llm"], ["jobs.work"]) for node_id in "ab"}
    for node_id in "ab":
        counts.ended("llm", Outcome.SUCCEEDED, 1.0)
        Teller(broker.client, broker.keys, node_id, counts).tell({"llm": 1}, 0.0)
    before = scrape(cluster)
    assert value(before, "cluster_jobs_total", type="llm", outcome="succeeded") == 2
    assert value(before, "cluster_node_jobs_total", node="a", type="llm", outcome="succeeded") == 1
    broker.epochs.fence("a", broker.epochs.beats()["a"])
    assert isinstance(epochs["a"], str)
    after = scrape(cluster)
    assert value(after, "cluster_jobs_total", type="llm", outcome="succeeded") == 2
    assert value(after, "cluster_job_run_seconds_count", type="llm") == 2
    assert {dict(labels)["node"] for name, labels in after if name == "cluster_node_jobs_total"} == {"b"}
    broker.epochs.open("a", ["llm"], ["jobs.work"])
    counts.ended("llm", Outcome.FAILED, 1.0)
    Teller(broker.client, broker.keys, "a", counts).tell({}, 0.0)
    again = scrape(cluster)
    assert value(again, "cluster_node_jobs_total", node="a", type="llm", outcome="succeeded") == 1
    assert value(again, "cluster_node_jobs_total", node="a", type="llm", outcome="failed") == 1


def test_lists_limits_breakers_and_coordinators_are_told(
    broker: Broker, redis_url: str, new_cluster: NewCluster
) -> None:
    cluster = new_cluster(redis_url)
    epoch = broker.epochs.open("a", ["llm"], ["jobs.work"])
    assert isinstance(epoch, str)
    broker.epochs.open("chief", [])
    for number in range(3):
        broker.publish(str(number), "a", "llm", priority=number * 3)
    broker.put(b'{"headers": {}, "properties": {}}', "node.a.bound")
    broker.publish("waits", "", "ocr")
    broker.epochs.limit("a", epoch, None, Limit.read("1 ramping t 2"))
    policy = BreakerPolicy(failure_threshold=1, window=2)
    breaker = SharedBreaker(broker.client, broker.keys, "gpt at home", policy, Limits(), 0.0)
    breaker.record(breaker.admit(0), Ending.FAILURE, None)
    told = scrape(cluster)
    assert value(told, "cluster_up") == value(told, "cluster_registry_up") == value(told, "cluster_coordinators") == 1
    assert value(told, "cluster_node_queued_jobs", node="a") == 4
    assert value(told, "cluster_node_limit_slots", node="a", phase="ramping") == 1
    assert value(told, "cluster_waiting_jobs", type="ocr") == 1
    assert value(told, "cluster_serving_nodes", type="llm") == 1
    assert ("cluster_serving_nodes", (("type", "ocr"),)) in told
    assert value(told, "cluster_serving_nodes", type="ocr") == 0
    assert value(told, "cluster_breaker_state", provider="gpt at home", state="open") == 1
    assert value(told, "cluster_provider_requests_total", provider="gpt at home", outcome="failure") == 1
    assert not any(dict(labels).get("node") == "chief" for name, labels in told if name != "cluster_node_beats_total")


def test_a_scrape_takes_few_round_trips_for_many_nodes(broker: Broker, redis_url: str, new_cluster: NewCluster) -> None:
    cluster = new_cluster(redis_url)

    def reads_of_a_scrape() -> int:
        # The first one after a while makes connections, or looks whether they still stand.
        scrape(cluster)
        before: Any = broker.client.info("stats")
        assert value(scrape(cluster), "cluster_up") == 1
        after: Any = broker.client.info("stats")
        return int(after["total_reads_processed"]) - int(before["total_reads_processed"])

    broker.epochs.open("first", ["llm"], ["jobs.work"])
    few = reads_of_a_scrape()
    for number in range(60):
        node_id = f"node{number}"
        broker.epochs.open(node_id, ["llm"], ["jobs.work"])
        counts = Counts()
        counts.ended("llm", Outcome.SUCCEEDED, 1.0, 1.0)
        Teller(broker.client, broker.keys, node_id, counts).tell({"llm": 1}, 0.0)
    # The client writes a long request in several pieces.
    assert reads_of_a_scrape() <= few + 3 <= 8


def test_a_redis_that_is_away_is_told_at_once(new_cluster: NewCluster) -> None:
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        told = scrape(new_cluster(f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"))
    assert told[("cluster_up", ())] == told[("cluster_registry_up", ())] == 0
    assert not any(name.startswith("cluster_node") for name, _ in told)


def test_a_redis_that_takes_connections_and_never_answers_does_not_hold_up_the_scrape(new_cluster: NewCluster) -> None:
    with closing(socket.socket()) as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(100)
        cluster = new_cluster(f"redis://127.0.0.1:{hole.getsockname()[1]}/0")
        began_s = time.monotonic()
        told = scrape(cluster)
        took_s = time.monotonic() - began_s
    assert told[("cluster_up", ())] == 0
    assert took_s < 30, "Redis is given two seconds; the rest is for a busy machine"


def promtool(*words: str, given: str = "") -> str:
    """Run Prometheus' own tool, which must have nothing to say against what it is shown; return what it says."""
    command = shutil.which("promtool")
    if command is None:
        missing("promtool is not installed: Debian has it in the package prometheus")
    done = subprocess.run([command, *words], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(RULES))


def test_the_rules_say_what_is_wrong_and_are_silent_while_nothing_is() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(Path(__file__).with_name("alerts_on_series.yml")))


def test_prometheus_finds_no_fault_with_what_is_exported(
    broker: Broker, redis_url: str, new_cluster: NewCluster
) -> None:
    broker.epochs.open("a", ["llm"], ["jobs.work"])
    counts = Counts()
    counts.ended("llm", Outcome.SUCCEEDED, 1.0, 1.0)
    Teller(broker.client, broker.keys, "a", counts).tell({"llm": 1}, 0.0)
    registry = CollectorRegistry()
    registry.register(new_cluster(redis_url).metrics)
    assert promtool("check", "metrics", given=generate_latest(registry).decode()) == ""
