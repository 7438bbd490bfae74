"""Clusters of any size are simulated from what small ones say; here the small ones say what is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from benchmarks.commands import Identity, followed
from benchmarks.figures import exponent
from benchmarks.fleet import patient
from benchmarks.growth import Growth, Recording, Simulation
from cluster_tasks import Cluster
from cluster_tasks.model import Capacity, Load, Node, NodeStatus
from tests.waiting import wait_until

ROUNDS_PER_S, LASTED_S = 4, 2
NODE = Node(id="sample@test", serves=frozenset({"sleep"}), capacity=Capacity(max_connections=1))


@pytest.fixture
def cluster(redis_url: str) -> Iterator[Cluster]:
    app = Celery("growth", broker=redis_url, backend=redis_url, set_as_current=False)
    yield Cluster(app)
    app.close()


def record(cluster: Cluster, url: str, size: int) -> Recording:
    """What so many nodes say each of which beats, and reads the beats of all others, four times a second, as if it were
    two seconds."""
    nodes = []
    for number in range(size):
        name = f"n{number}@test"
        epoch = cluster.epochs.open(name, NODE.serves)
        assert isinstance(epoch, str)
        cluster.registry.register(NODE.model_copy(update={"id": name, "epoch": epoch}))
        nodes.append(Identity(name, epoch))
    with followed(url) as commands:
        for node in nodes * (ROUNDS_PER_S * LASTED_S):
            cluster.epochs.beat(node.node, node.epoch)
            cluster.registry.beat(node.node, Load(), NodeStatus.ONLINE)
            cluster.epochs.beats()
    for node in nodes:
        cluster.epochs.close(node.node, node.epoch)
    return Recording(nodes, commands, LASTED_S)


def test_the_simulation_finds_what_grows_with_the_square_and_what_does_not(cluster: Cluster, redis_url: str) -> None:
    growth = Growth([record(cluster, redis_url, size) for size in (4, 8)])
    sizes = (100, 1_600)

    def measured() -> dict[str, float]:
        costs = [simulation.costs(growth, size) for size in sizes]
        # Nodes are as real as those that registered themselves.
        beats = cluster.epochs.beats()
        assert len(beats) == len(cluster.nodes()) == sizes[-1]
        assert sum(beat.counter > 0 for beat in beats.values()) == sizes[-1]
        return {kind: exponent(sizes, [by_kind[kind].share for by_kind in costs]) for kind in costs[0]}

    def is_told_apart() -> bool:
        found = measured()
        beats = max(found["beat cluster:epochs"], found["beat cluster:nodes"])
        return found["HGETALL cluster:beats"] > 1.5 and beats < 1.4

    with patient(redis_url) as client:
        simulation = Simulation(client, cluster, NODE)
        # These are microseconds of processor: a busy machine makes a measurement wrong now and then.
        wait_until(is_told_apart, within_s=60, message="reading all beats grows with the square, a beat does not")
