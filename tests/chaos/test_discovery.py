"""The registry is away under load: jobs are placed and run on, nodes that come meanwhile work."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.harness import Chaos, chaos_on
from tests.consul_server import ConsulServer
from tests.process.accounts import END_S
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KEPT_SHARE = 0.9
"""Of the throughput of the time before, while the registry is away."""


@pytest.fixture
def consul(redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConsulServer]:
    """The registry of everybody in the scenario."""
    with ConsulServer(tmp_path / "consul") as server:
        monkeypatch.setenv("CLUSTER_REGISTRY_URL", server.url())
        yield server


@pytest.fixture
def chaos(consul: ConsulServer, redis_server: RedisServer, tmp_path: Path, rng: random.Random) -> Iterator[Chaos]:
    """A scenario whose nodes are registered there."""
    with chaos_on(redis_server.url, tmp_path, rng) as made:
        yield made


@pytest.mark.chaos("short")
@pytest.mark.timed
@pytest.mark.timeout(600)
def test_an_outage_of_the_registry_costs_no_job_and_hardly_any_time(
    chaos: Chaos, consul: ConsulServer, by_level: ByLevel
) -> None:
    seconds = by_level(short=10, full=60)
    # Every setting is at its default. What limits the throughput is the sender, as long as nobody stands still.
    with chaos.nodes(3, pools=("threads", "prefork", "solo")) as nodes:
        nodes.wait_ready()
        with chaos.load(kinds=("plain", "silent"), pause_s=0.05, lengths_s=(0.0, 0.05)) as load:

            def ended_within(s: float) -> int:
                before = len(chaos.history.committed)
                time.sleep(s)  # What is measured is a rate.
                return len(chaos.history.committed) - before

            wait_until(lambda: len(chaos.history.committed) > 50, END_S, "they work")
            usual = ended_within(seconds)
            consul.kill()
            (joined,) = nodes.add()
            meanwhile = ended_within(seconds)
            wait_until(joined.is_ready, END_S, "a node joins without the registry")
            wait_until(lambda: chaos.checker.epoch_of(joined.id), END_S, "the fence knows it")
            epoch = chaos.checker.epoch_of(joined.id)
            wait_until(lambda: epoch in {commit.epoch for commit in chaos.history.commits}, END_S, "it works")
            consul.start()
            alive = {worker.id for worker in nodes.alive}
            registry = chaos.jobs.cluster.registry
            wait_until(lambda: {node.id for node in registry.list()} == alive, END_S, "the registry knows all nodes")
            chaos.checker.check(load)
        chaos.checker.nothing_ran_twice(load)
    print(f"{usual} jobs in {seconds} s with the registry, {meanwhile} without it")
    if by_level(short=False, full=True):
        assert meanwhile >= KEPT_SHARE * usual
