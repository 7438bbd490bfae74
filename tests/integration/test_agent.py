"""The agent of a node by itself: a real one, on a real Redis, without the worker around it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.model import Capacity, Load, Node
from tests.broker import Broker
from tests.waiting import wait_until
from workers.agent import NodeAgent
from workers.executions import Executions

END_S = 60.0
QUICK = {"CLUSTER_LEASE_S": "2", "CLUSTER_HEARTBEAT_S": "0.25", "CLUSTER_HEALTH_CHECK_S": "0.1"}

NewAgent = Callable[[str], NodeAgent]


@pytest.fixture
def new_agent(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewAgent]:
    """Make agents of nodes, not started yet; each has an app of its own, as in a process of its own."""
    for name, value in {**QUICK, "CLUSTER_BROKER_URL": redis_url}.items():
        monkeypatch.setenv(name, value)
    made: list[tuple[Celery, NodeAgent]] = []

    def new(node_id: str) -> NodeAgent:
        app = Celery(node_id, set_as_current=False)
        cluster = Cluster(app)
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
