"""The health check: what it asks of whom, and what it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.failover.detector import Detector, Silent
from cluster_tasks.failover.evacuation import Evacuation
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.health import HealthCheck
from cluster_tasks.model import Node
from cluster_tasks.redis_store import connect
from cluster_tasks.registry.memory import MemoryRegistry
from tests.broker import Broker

LEASE_S = 3.0


class Discovery(MemoryRegistry):
    """A registry that counts how often it is told of an end, and can be away."""

    ends_told, is_down = 0, False

    def deregister(self, node_id: str, epoch: str) -> None:
        self.ends_told += 1
        if self.is_down:
            raise RegistryUnavailable("the test took it away")
        super().deregister(node_id, epoch)

    def known(self) -> list[str]:
        """The ids of its nodes."""
        return [node.id for node in self.list()]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def registry(clock: ManualClock) -> Discovery:
    return Discovery(clock)


@pytest.fixture
def events(broker: Broker, clock: ManualClock) -> EventLog:
    return EventLog(broker.client, broker.keys, clock)


@pytest.fixture
def health(broker: Broker, clock: ManualClock, registry: Discovery, events: EventLog) -> HealthCheck:
    return HealthCheck(broker.epochs, Detector(clock, LEASE_S), broker.evacuation, registry, events, clock)


@pytest.fixture
def lose(broker: Broker, clock: ManualClock, registry: Discovery, health: HealthCheck) -> Callable[..., None]:
    """Let nodes that hold a job each fall silent, and be failed over."""

    def these(*node_ids: str) -> None:
        for node_id in node_ids:
            epoch = broker.open(node_id, "llm")
            registry.register(Node(id=node_id, name=node_id, epoch=epoch))
            broker.publish(f"job of {node_id}", node_id)
            broker.fetch(node_id, epoch)
        seen = broker.epochs.beats()
        for node_id in node_ids:
            assert health.fail_over(node_id, seen[node_id], LEASE_S)

    return these


def test_a_failover_is_finished_before_the_registry_is_told(
    broker: Broker, registry: Discovery, health: HealthCheck, lose: Callable[..., None]
) -> None:
    lose("a", "b")
    health.act([])
    assert broker.epochs.fenced() == []
    assert sorted(broker.listed(broker.keys.suspect_queue("any"))) == ["job of a", "job of b"]
    assert (registry.ends_told, registry.known()) == (0, ["a", "b"])
    health.tell_registry()
    assert (registry.ends_told, registry.known()) == (2, [])


def test_a_registry_that_is_away_is_asked_once_and_told_of_the_rest_later(
    registry: Discovery, health: HealthCheck, lose: Callable[..., None]
) -> None:
    lose("a", "b", "c")
    registry.is_down = True
    health.tell_registry()
    assert (registry.ends_told, registry.known()) == (1, ["a", "b", "c"])
    registry.is_down = False
    health.tell_registry()
    assert len(registry.known()) == 1
    health.reap()
    assert registry.known() == []


def test_the_registry_knows_at_once_who_leaves_in_good_order(
    broker: Broker, registry: Discovery, health: HealthCheck
) -> None:
    epoch = broker.open("a", "llm")
    registry.register(Node(id="a", name="a", epoch=epoch))
    assert health.retire("a", epoch)
    assert registry.known() == []
    registry.is_down = True
    epoch = broker.open("a", "llm")
    assert health.retire("a", epoch), "it leaves also while the registry is away"


def test_the_search_for_orphans_walks_over_no_keys(broker: Broker, health: HealthCheck) -> None:
    broker.open("a", "llm")
    broker.client.config_resetstat()
    health.act([])
    assert not {"cmdstat_scan", "cmdstat_keys"} & broker.client.info("commandstats").keys()


@pytest.mark.parametrize("node_id", ["a", "a@host.with_all-signs"])
def test_what_an_epoch_held_that_no_table_knows_any_more_is_found_once(
    broker: Broker, health: HealthCheck, events: EventLog, node_id: str
) -> None:
    keys, client = broker.keys, broker.client
    lost, standing = broker.open(node_id, "llm"), broker.open("b", "llm")
    for holder, epoch in ((node_id, lost), ("b", standing)):
        broker.publish(f"job of {holder}", holder)
        broker.fetch(holder, epoch)
    client.hdel(keys.epochs, keys.node_queue(node_id))
    health.act([])
    assert broker.waiting() == [f"job of {node_id}"]
    assert broker.held("b", standing) == ["job of b"]
    assert client.smembers(keys.opened) == {f"b/{standing}".encode()}
    assert [event.kind for event in events.latest()] == ["jobs moved"]


def test_a_hundred_lost_nodes_take_hardly_more_round_trips_than_one(
    redis_url: str, broker: Broker, clock: ManualClock, registry: Discovery
) -> None:
    # Where many processes want to run each takes long, and all that these nodes had waits for the last of them.
    sent: list[bytes] = []

    class Counting(redis.Connection):
        def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            sent.append(command)
            super().send_packed_command(command, check_health=check_health)

    client = connect(redis_url, connection_class=Counting)
    keys, epochs = broker.keys, EpochTable(client, broker.keys)
    health = HealthCheck(
        epochs, Detector(clock, LEASE_S), Evacuation(client, keys), registry, EventLog(client, keys, clock), clock
    )

    def round_trips_to_lose(count: int) -> int:
        names = [f"n{number}" for number in range(count)]
        for name in names:
            epoch = broker.open(name, "llm")
            for number in range(4):
                broker.publish(f"{name} {number}", name, priority=3 * number)
            broker.fetch(name, epoch, 2)
        sent.clear()
        assert health.act([Silent(name, beat, LEASE_S) for name, beat in epochs.beats().items()]) == count
        assert epochs.fenced() == []
        jobs = [*broker.listed(keys.suspect_queue("any")), *broker.waiting()]
        assert sorted(jobs) == sorted(f"{name} {number}" for name in names for number in range(4))
        broker.client.flushall()
        return len(sent)

    # The first ones make a connection and look for orphans.
    round_trips_to_lose(1)
    one = round_trips_to_lose(1)
    # Of their four hundred messages a hundred are read at once, for they may be long.
    assert round_trips_to_lose(100) <= one + 2 * 4
    assert one <= 14
    client.close()


def test_no_name_is_left_of_epochs_that_have_ended(broker: Broker, health: HealthCheck) -> None:
    keys, client = broker.keys, broker.client
    for _ in range(2):
        health.retire("a", broker.open("a", "llm"))
        broker.open("b", "llm")
        assert health.fail_over("b", broker.epochs.beats()["b"], LEASE_S)
    assert not client.exists(keys.opened)
