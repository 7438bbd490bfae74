"""A caller's jobs among the nodes of two zones, over a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster, ClusterTask
from cluster_tasks.broker.epochs import Beat
from cluster_tasks.cluster import cluster_of
from cluster_tasks.model import ZONE, Capacity, Node, NodeRole
from tests.broker import Broker

ZONES = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
SLOTS = 2


@contextmanager
def caller(url: str, **settings: Any) -> Iterator[Any]:
    """A task of an app with these settings, none of whose nodes does anything."""
    with Celery("caller", set_as_current=False, broker=url) as app:
        app.conf.update({f"cluster_{name}": value for name, value in settings.items()})
        Cluster(app)

        @app.task(
            base=ClusterTask, name="jobs.work", request_type="llm", affinity="key", ignore_result=True, shared=False
        )
        def work(key: str = "") -> None:
            """Nothing: no node runs it."""

        yield work


@pytest.fixture
def epochs(broker: Broker) -> dict[str, str]:
    """The nodes, which stand in the epoch table."""
    return {node_id: broker.open(node_id, "llm", zone=zone) for node_id, zone in ZONES.items()}


def register(work: Any, epochs: dict[str, str]) -> Cluster:
    """Make the nodes known; all callers of a test have the same registry."""
    cluster = cluster_of(work.app)
    for node_id, epoch in epochs.items():
        node = Node(
            id=node_id, roles=frozenset({NodeRole.WORKER}), serves=frozenset({"llm"}), metadata={ZONE: ZONES[node_id]},
            capacity=Capacity(max_connections=SLOTS), epoch=epoch,
        )  # fmt: skip
        cluster.registry.register(node)
    return cluster


def listed(broker: Broker) -> dict[str, int]:
    """How many jobs wait in the lists of each zone."""
    lengths = dict.fromkeys(ZONES.values(), 0)
    for queue, length in broker.epochs.lengths().items():
        lengths[ZONES[str(broker.keys.node_of(queue))]] += length
    return lengths


@pytest.mark.parametrize("strategy", ["adaptive", "consistent_hash", "least_connection", "round_robin", "weighted"])
def test_each_caller_fills_its_own_zone_first(broker: Broker, epochs: dict[str, str], strategy: str) -> None:
    url = broker_url(broker)
    with caller(url, zone="a") as here, caller(url, zone="b") as there:
        register(here, epochs)
        for number in range(4):
            here.apply_async((f"key {number}",), headers={"strategy": strategy})
        assert listed(broker) == {"a": 4, "b": 0}
        for number in range(4):
            there.apply_async((f"key {number}",), headers={"strategy": strategy})
        assert listed(broker) == {"a": 4, "b": 4}


def test_a_full_zone_spills_over_and_lists_stay_within_the_bound(broker: Broker, epochs: dict[str, str]) -> None:
    with caller(broker_url(broker), zone="a") as work:
        cluster = register(work, epochs)
        for _ in range(80):
            work.delay()
        lengths = listed(broker)
        # Half of the slots may have 1.25 times the mean; a view that is a moment old may count a job twice.
        assert 45 <= lengths["a"] <= 51
        assert cluster.rebalance().moved == 0
        assert listed(broker) == lengths


def test_what_is_above_the_bound_is_moved_to_other_zones(broker: Broker, epochs: dict[str, str]) -> None:
    with caller(broker_url(broker), zone="a", zone_bound="inf") as work:
        register(work, epochs)
        for _ in range(80):
            work.delay()
        assert listed(broker) == {"a": 80, "b": 0}
    with caller(broker_url(broker), zone="a") as work:
        assert cluster_of(work.app).rebalance().moved == 40
        assert listed(broker) == {"a": 40, "b": 40}


def test_an_idle_node_takes_from_the_list_of_another_zone(broker: Broker, epochs: dict[str, str]) -> None:
    with caller(broker_url(broker), zone="a", zone_bound="inf") as work:
        register(work, epochs)
        for _ in range(6):
            work.delay()
        assert len(broker.fetch("b1", epochs["b1"], SLOTS, ["llm"]).jobs) == SLOTS
        assert listed(broker) == {"a": 4, "b": 0}


def test_a_zone_that_is_lost_leaves_its_jobs_to_the_other_and_gets_no_more(
    broker: Broker, epochs: dict[str, str]
) -> None:
    with caller(broker_url(broker), zone="a") as work:
        cluster = register(work, epochs)
        sent = {work.delay().id for _ in range(4)}
        held = broker.fetch("a1", epochs["a1"], 1, ["llm"]).jobs
        for node_id in "a1", "a2":
            assert cluster.health.fail_over(node_id, Beat(epochs[node_id], 0), 3.0)
        cluster.health.tell_registry()
        assert set(broker.waiting("llm")) | set(broker.listed("suspect.llm")) == sent
        assert broker.listed("suspect.llm") == held
        cluster.view.refresh()
        work.delay()
        assert listed_at(broker, "b") == 1
        # Both kinds are taken by who is left.
        taken = [job for node_id in ("b1", "b2") for job in broker.fetch(node_id, epochs[node_id], 4, ["llm"]).jobs]
        assert sent <= set(taken)


def listed_at(broker: Broker, zone: str) -> int:
    return sum(broker.epochs.lengths().get(f"node.{node_id}", 0) for node_id in ZONES if ZONES[node_id] == zone)


def broker_url(broker: Broker) -> str:
    where = broker.client.connection_pool.connection_kwargs
    return f"redis://{where['host']}:{where['port']}/{where['db']}"
