"""The registries that the contract suite runs against."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cluster_tasks.clock import Clock, ManualClock, SystemClock
from cluster_tasks.keys import Keys
from cluster_tasks.registry import MemoryRegistry, RedisRegistry, Registry, create_registry
from cluster_tasks.registry.consul import ConsulRegistry
from cluster_tasks.registry.etcd import EtcdRegistry
from tests.consul_server import ConsulServer
from tests.etcd_server import EtcdServer
from workers.redis_server import RedisServer

OpenRegistry = Callable[[], Registry]
"""Opens one more client of the same registry, as another process would."""


def memory(clock: Clock, request: pytest.FixtureRequest) -> OpenRegistry:
    registry = MemoryRegistry(clock)
    return lambda: registry


def redis(clock: Clock, request: pytest.FixtureRequest) -> OpenRegistry:
    server: RedisServer = request.getfixturevalue("redis_server")
    return lambda: RedisRegistry(server.url, Keys("contract"), clock)


def etcd(clock: Clock, request: pytest.FixtureRequest) -> OpenRegistry:
    server: EtcdServer = request.getfixturevalue("etcd_server")
    return lambda: create_registry(server.url, broker_url="", keys=Keys("contract"), clock=clock)


def consul(clock: Clock, request: pytest.FixtureRequest) -> OpenRegistry:
    server: ConsulServer = request.getfixturevalue("consul_server")
    keys = Keys(f"c{uuid.uuid4().hex[:12]}")
    return lambda: ConsulRegistry(server.url(), keys, clock)


# An implementation joins the suite with one line.
IMPLEMENTATIONS: dict[str, Callable[[Clock, pytest.FixtureRequest], OpenRegistry]] = {
    "memory": memory,
    "redis": redis,
    "etcd": etcd,
    "consul": consul,
}


@pytest.fixture(scope="module")
def consul_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    """A Consul that the tests of a module share; each uses a cluster name of its own."""
    with ConsulServer(tmp_path_factory.mktemp("consul")) as server:
        yield server


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_000.0)


@pytest.fixture(params=IMPLEMENTATIONS)
def open_registry(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[OpenRegistry]:
    """Opens clients of one registry that is empty at first; they are closed after the test."""
    new = IMPLEMENTATIONS[request.param](clock, request)
    with ExitStack() as opened:
        yield lambda: opened.enter_context(closing(new()))


@pytest.fixture
def registry(open_registry: OpenRegistry) -> Registry:
    return open_registry()


@pytest.fixture
def in_etcd(etcd_server: EtcdServer) -> Iterator[EtcdRegistry]:
    with closing(EtcdRegistry(etcd_server.url, Keys("contract"), SystemClock())) as registry:
        yield registry


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server whose users and data no other test meets."""
    with EtcdServer(tmp_path) as server:
        yield server
