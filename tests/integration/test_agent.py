"""The agent of a node by itself: a real one, on a real Redis, without the worker around it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from celery import Celery
from celery.worker import state

from cluster_tasks import Cluster
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.broker.revocations import Revocations
from cluster_tasks.clock import SystemClock
from cluster_tasks.failover.watchers import SEATS, Watchers
from cluster_tasks.model import Capacity, Load, Node, NodeStatus
from cluster_tasks.registry.base import Registry
from cluster_tasks.registry.memory import MemoryRegistry
from tests.broker import Broker
from tests.waiting import wait_until
from workers.agent import NodeAgent
from workers.executions import Executions

END_S = 120.0
QUICK = {"CLUSTER_LEASE_S": "2", "CLUSTER_HEARTBEAT_S": "0.25", "CLUSTER_HEALTH_CHECK_S": "0.1"}

MAY_WAIT = {"cluster-load report", "cluster-ejection", "cluster-rebalance", "cluster-shards"}
"""The threads of an agent that nobody waits for."""

NewAgent = Callable[..., NodeAgent]


class Asked(MemoryRegistry):
    """A registry that notes which threads ask it."""

    def __init__(self) -> None:
        super().__init__(SystemClock())
        self.by: set[str] = set()

    def register(self, node: Node) -> None:
        self._note()
        super().register(node)

    def beat(self, node_id: str, load: Load, status: NodeStatus) -> None:
        self._note()
        super().beat(node_id, load, status)

    def deregister(self, node_id: str, epoch: str) -> None:
        self._note()
        super().deregister(node_id, epoch)

    def list(self, *args: Any) -> Sequence[Node]:
        self._note()
        return super().list(*args)

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        self._note()
        super().set_status(node_id, status)

    def knows(self, node_id: str, epoch: str) -> bool:
        """Whether it has a node under this epoch."""
        return any(node.id == node_id and node.epoch == epoch for node in super().list())

    def _note(self) -> None:
        self.by.add(threading.current_thread().name)


@pytest.fixture
def new_agent(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewAgent]:
    """Make agents of nodes, not started yet; each has an app of its own, as in a process of its own."""
    for name, value in {**QUICK, "CLUSTER_BROKER_URL": redis_url}.items():
        monkeypatch.setenv(name, value)
    made: list[tuple[Celery, NodeAgent]] = []

    def new(node_id: str, registry: Registry | None = None) -> NodeAgent:
        app = Celery(node_id, set_as_current=False)
        cluster = Cluster(app)
        if registry is not None:
            cluster.registry = registry
        capacity = Capacity(max_connections=4, max_threads=4)
        node = Node(id=node_id, name=node_id, serves=frozenset({"llm"}), capacity=capacity)
        held = Deliveries(node_id, node.serves, cluster.keys, cluster.client, cluster.clock, lambda: 4)
        agent = NodeAgent(cluster, node, held, Load, executions=Executions(None))
        made.append((app, agent))
        return agent

    yield new
    for app, agent in made:
        agent.stop()
        app.close()


@pytest.fixture
def silent_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that takes connections and never answers, as a stopped process or a black hole on the way does."""
    with closing(socket.socket()) as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(1000)
        monkeypatch.setenv("CLUSTER_REGISTRY_URL", f"consul://127.0.0.1:{hole.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("silent_registry")
def test_nodes_watch_each_other_while_the_registry_is_silent(new_agent: NewAgent, broker: Broker) -> None:
    new_agent("a").start()
    epoch = broker.open("dead", "llm")
    broker.publish("1", "dead", "llm")
    broker.fetch("dead", epoch, 1, ["llm"])
    wait_until(lambda: "dead" not in broker.epochs.beats(), END_S, "it is fenced")
    wait_until(lambda: broker.listed(broker.keys.suspect_queue("llm")) == ["1"], END_S, "its job is moved")


def test_what_was_revoked_is_known_before_a_node_can_be_given_a_job(
    new_agent: NewAgent, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, known = f"revoked-{time.time()}", list[bool]()
    Revocations(broker.client, broker.keys).add([job_id])
    open_epoch = EpochTable.open

    def look_and_open(self: EpochTable, *args: Any, **options: Any) -> Any:
        known.append(job_id in state.revoked)
        return open_epoch(self, *args, **options)

    monkeypatch.setattr(EpochTable, "open", look_and_open)
    new_agent("a").start()
    assert known == [True]


def test_a_seat_is_kept_by_asking_and_free_when_its_holder_is_silent(broker: Broker) -> None:
    lease_s, began_s = 600.0, time.time()
    seats = Watchers(broker.client, broker.keys, lease_s, seats=2)
    assert [seats.take_seat(node_id) for node_id in "abcab"] == [
        (True, 0), (True, 0), (False, 0), (True, 0), (True, 0),
    ]  # fmt: skip
    ends_ms = broker.client.zscore(broker.keys.watchers, "a")
    assert int(began_s * 1000) <= ends_ms - 1000 * lease_s <= time.time() * 1000
    # As when it has been silent for that long.
    broker.client.zadd(broker.keys.watchers, {"a": ends_ms - 1000 * lease_s - 1})
    assert [seats.take_seat(node_id)[0] for node_id in "bca"] == [True, True, False]


def test_seats_that_were_given_before_the_clock_went_back_are_free(broker: Broker) -> None:
    seats = Watchers(broker.client, broker.keys, lease_s=1.0, seats=2)
    broker.client.zadd(broker.keys.watchers, dict.fromkeys("ab", (time.time() + 300) * 1000))
    assert seats.take_seat("c") == (True, 0)


def test_who_has_no_seat_observes_nobody_until_one_is_free(
    new_agent: NewAgent, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever is late with his seat by so much loses it.
    lease_s = 4.0
    monkeypatch.setenv("CLUSTER_LEASE_S", str(lease_s))
    broker.client.incr(broker.keys.checks)
    seats = Watchers(broker.client, broker.keys, lease_s)

    def others_observe() -> list[bool]:
        return [seats.take_seat(f"other{number}")[0] for number in range(SEATS)]

    assert all(others_observe())
    agent = new_agent("a")
    agent.start()
    dead = broker.open("dead", "llm")
    until_s = time.monotonic() + 2 * lease_s
    while time.monotonic() < until_s:
        assert all(others_observe())
        time.sleep(0.1)
    assert broker.epochs.beats()["dead"].epoch == dead
    wait_until(lambda: "dead" not in broker.epochs.beats(), END_S, "the others are silent: it is fenced")


def test_who_has_no_seat_does_not_look_who_is_to_be_forgotten(
    new_agent: NewAgent, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.agent.REAP_EVERY_S", 0.0)
    monkeypatch.setenv("CLUSTER_LEASE_S", "600")
    seats, registry = Watchers(broker.client, broker.keys, 600.0), Asked()
    assert all(seats.take_seat(f"other{number}")[0] for number in range(SEATS))
    registry.register(Node(id="gone", name="gone", epoch="of before"))
    agent = new_agent("a", registry)
    agent.start()
    first = agent.beats
    wait_until(lambda: agent.beats > first + 8, END_S, "it has reported its load again and again")
    assert registry.knows("gone", "of before")
    broker.client.delete(broker.keys.watchers)
    wait_until(lambda: not registry.knows("gone", "of before"), END_S, "it has a seat and looks")


def test_neither_beating_nor_joining_nor_watching_waits_for_the_registry(new_agent: NewAgent, broker: Broker) -> None:
    registry = Asked()
    agent = new_agent("a", registry)
    agent.start()
    first, dead = agent.node.epoch, broker.open("dead", "llm")
    registry.register(Node(id="dead", name="dead", epoch=dead))
    wait_until(lambda: registry.knows("a", first), END_S, "it is registered")
    broker.epochs.set_draining("a", True)
    wait_until(lambda: registry.get("a").status is NodeStatus.DRAINING, END_S, "it knows that it drains")
    wait_until(lambda: broker.epochs.fence("a", broker.epochs.beats()["a"]), END_S, "it is fenced")
    wait_until(lambda: "a" in broker.epochs.beats(), END_S, "it joins anew")
    wait_until(lambda: registry.knows("a", broker.epochs.beats()["a"].epoch), END_S, "it is registered anew")
    wait_until(lambda: broker.epochs.lists().draining == {"node.a"}, END_S, "it still drains")
    wait_until(lambda: not registry.knows("dead", dead), END_S, "the other is failed over")
    assert registry.by - {threading.current_thread().name} <= MAY_WAIT


def test_a_node_is_registered_when_it_has_started(new_agent: NewAgent) -> None:
    registry = Asked()
    agent = new_agent("a", registry)
    agent.start()
    assert registry.knows("a", agent.node.epoch)
    assert registry.by <= MAY_WAIT


def test_a_node_that_has_given_up_joins_no_more_and_begins_nothing(new_agent: NewAgent, broker: Broker) -> None:
    agent = new_agent("a")
    agent.start()
    broker.publish("1", "a", "llm")
    agent.give_up("the test says so")
    beats, register = agent.beats, agent._deliveries
    assert register is not None
    wait_until(lambda: agent.beats >= beats + 3, END_S, "it has tried to beat")
    assert broker.epochs.beats() == {}
    wait_until(lambda: not register.is_sure(), END_S, "it begins nothing that it has given away")
    assert broker.waiting("llm") == ["1"]


def test_a_node_that_joins_is_told_of_once_in_each_epoch(new_agent: NewAgent, broker: Broker) -> None:
    agent = new_agent("a")
    agent.start()
    events = agent._cluster.events

    def joined() -> list[str]:
        return [event.facts["epoch"] for event in events.latest(100) if event.kind == "node joined"]

    first = agent.node.epoch
    wait_until(lambda: joined() == [first], END_S, "it is told")
    # The registry has lost it: it registers again, and has not joined again.
    agent._cluster.registry.deregister("a", first)
    wait_until(lambda: [node.id for node in agent._cluster.nodes()] == ["a"], END_S, "it is registered again")
    wait_until(lambda: broker.epochs.fence("a", broker.epochs.beats()["a"]), END_S, "it is fenced")
    wait_until(lambda: joined()[-1] != first, END_S, "it joins anew")
    assert joined() == [first, agent.node.epoch]
