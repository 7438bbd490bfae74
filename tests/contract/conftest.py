"""The registries and stores that the contract suites run against."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from cluster_tasks.clock import Clock, ManualClock, SystemClock
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks
from cluster_tasks.registry import MemoryRegistry, RedisRegistry, Registry, create_registry
from cluster_tasks.registry.consul import ConsulRegistry
from cluster_tasks.registry.etcd import EtcdRegistry
from cluster_tasks.shards.qdrant import open_store
from cluster_tasks.shards.store import CollectionStore
from cluster_tasks.shards.vector_store import VectorStore
from tests.consul_server import ConsulServer
from tests.contract.locking import ConsulStage, EtcdStage, OpenLocks, RedisStage, Stage
from tests.etcd_server import KEPT, EtcdServer
from tests.qdrant_server import QdrantServer
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
    return lambda: create_registry(f"{server.url}?{KEPT}", broker_url="", keys=Keys("contract"), clock=clock)


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


@contextmanager
def lancedb(folder: Path, shards: int = 1) -> Iterator[VectorStore]:
    yield CollectionStore(str(folder), shards)


@contextmanager
def qdrant_in_this_process(folder: Path) -> Iterator[VectorStore]:
    with closing(open_store(f"qdrant://{folder}")) as store:
        yield store


@contextmanager
def qdrant_server(folder: Path) -> Iterator[VectorStore]:
    with QdrantServer() as server, closing(open_store(server.url)) as store:
        yield store


# Likewise.
STORES: dict[str, Callable[[Path], AbstractContextManager[VectorStore]]] = {
    "lancedb": lancedb,
    "lancedb in three shards": partial(lancedb, shards=3),
    "qdrant in this process": qdrant_in_this_process,
    "qdrant over http": qdrant_server,
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    """A store that is empty at first."""
    with STORES[request.param](tmp_path / "data") as store:
        yield store


@pytest.fixture(scope="module", params=STORES)
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorStore]:
    """For the examples of one property, which need no new store each."""
    with STORES[request.param](tmp_path_factory.mktemp("stores") / "data") as store:
        yield store


@pytest.fixture(scope="module")
def consul_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    """A Consul that the tests of a module share; each uses a cluster name of its own."""
    with ConsulServer(tmp_path_factory.mktemp("consul")) as server:
        yield server


# An implementation joins the suites of locks with one line.
STAGES: dict[str, Callable[[pytest.FixtureRequest], Stage]] = {
    "redis": lambda request: RedisStage(request.getfixturevalue("redis_server")),
    "consul": lambda request: ConsulStage(request.getfixturevalue("consul_server")),
    "etcd": lambda request: EtcdStage(request.getfixturevalue("etcd_server")),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    """A server that locks live in."""
    return STAGES[request.param](request)


@pytest.fixture
def open_locks(stage: Stage) -> Iterator[OpenLocks]:
    """Opens clients of one store; they are closed after the test."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(closing(stage.open()))


@pytest.fixture
def locks(open_locks: OpenLocks) -> Locks:
    """One of them."""
    return open_locks()


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
    with closing(EtcdRegistry(f"{etcd_server.url}?{KEPT}", Keys("contract"), SystemClock())) as registry:
        yield registry


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server whose users and data no other test meets."""
    with EtcdServer(tmp_path) as server:
        yield server
