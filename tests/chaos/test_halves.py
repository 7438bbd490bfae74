"""Half of the nodes are cut off from Redis and from the registry, which is Consul or etcd, and come back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.conftest import ByLevel
from tests.chaos.divided import Divided
from tests.chaos.harness import FORGIVING, chaos_on
from tests.chaos.partitions import redis_behind_links
from tests.consul_server import ConsulServer
from tests.etcd_server import EtcdServer
from tests.process.nodes import running


def registry_in(kind: str, directory: Path, hosts: Sequence[str]) -> ConsulServer | EtcdServer:
    """A server that listens at these addresses of this machine as well."""
    server = ConsulServer if kind == "consul" else EtcdServer
    return server(directory, also_at=hosts)


@pytest.fixture(params=["consul", "etcd"])
def halves(
    request: pytest.FixtureRequest, redis_binary: str, tmp_path: Path, rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Divided]:  # fmt: skip
    """Two nodes behind each of two links. Every setting of time is at its default."""
    with ExitStack() as stack:
        server, links, notes_url = stack.enter_context(redis_behind_links(tmp_path / "redis", 2))
        hosts = [link.address for link in links]
        registry = stack.enter_context(registry_in(request.param, tmp_path / "registry", hosts))
        url = registry.url if isinstance(registry, EtcdServer) else registry.url()
        monkeypatch.setenv("CLUSTER_REGISTRY_URL", url)
        chaos = stack.enter_context(chaos_on(server.url, tmp_path, rng, notes_url=notes_url))
        workers, own = [], []
        for number, (pool, link) in enumerate(
            [("prefork", links[0]), ("solo", links[0]), ("prefork", links[1]), ("threads", links[1])], 1
        ):
            found_at = url.replace(f"127.0.0.1:{registry.port}", link.way_to(registry.port))
            environ = {**FORGIVING, "CLUSTER_REGISTRY_URL": found_at}
            workers.append(chaos.worker(f"n{number}", pool, broker_url=link.url, within=link.within, environ=environ))
            own.append(link)
        stack.enter_context(running(*workers))
        yield Divided(chaos, workers, own)


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_a_half_that_is_cut_off_stops_before_the_other_does_its_work(halves: Divided, by_level: ByLevel) -> None:
    with halves.chaos.load() as load:
        for how in by_level(short=["full"], full=["full", "requests", "replies", "full"]):
            halves.cut_off(halves.chaos.rng.choice(halves.links), how)
        halves.settle(load, [worker.id for worker in halves.workers])


@pytest.mark.chaos("short")
@pytest.mark.timeout(600)
def test_halves_whose_network_comes_and_goes_lose_and_double_nothing(halves: Divided, by_level: ByLevel) -> None:
    with halves.chaos.load() as load:
        halves.flap(by_level(short=10, full=120))
        halves.settle(load, [worker.id for worker in halves.workers])
