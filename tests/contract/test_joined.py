"""Two clusters, each with a registry of its own, looked at from one of them: it sees all, and changes nothing there."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.failover.detector import Silent
from cluster_tasks.keys import Keys
from cluster_tasks.model import ZONE, Capacity, EventType, Load, Node, NodeRole, NodeStatus
from cluster_tasks.redis_store import connect
from cluster_tasks.registry import Registry, create_registry
from cluster_tasks.registry.joined import OWN, JoinedRegistries
from tests.broker import Broker
from tests.consul_server import ConsulServer
from tests.etcd_server import EtcdServer
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import HOST, RedisServer, free_port

END_S = 60.0
KEYS = Keys("cluster")


def node(node_id: str, zone: str, *, held: int = 0, epoch: str = "1-a") -> Node:
    return Node(
        id=node_id, serves=frozenset({"llm"}), capacity=Capacity(max_connections=2), epoch=epoch,
        load=Load(current_connections=held), metadata={ZONE: zone},
    )  # fmt: skip


Servers = tuple[Any, Any]


@contextmanager
def two_consuls(directory: Path) -> Iterator[Servers]:
    """Two datacentres, neither of which knows the other."""
    with (
        ConsulServer(directory / "west", settings={"datacenter": "west"}) as west,
        ConsulServer(directory / "east", settings={"datacenter": "east"}) as east,
    ):
        yield west, east


@contextmanager
def two_etcds(directory: Path) -> Iterator[Servers]:
    with EtcdServer(directory / "west") as west, EtcdServer(directory / "east") as east:
        yield west, east


@contextmanager
def two_redises(directory: Path) -> Iterator[Servers]:
    with redis_for_results(directory / "west") as west, redis_for_results(directory / "east") as east:
        yield west, east


PAIRS: dict[str, Callable[[Path], Any]] = {"consul": two_consuls, "etcd": two_etcds, "redis": two_redises}


@pytest.fixture(scope="module", params=PAIRS)
def servers(request: pytest.FixtureRequest, redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with PAIRS[request.param](tmp_path_factory.mktemp(request.param)) as pair:
        yield pair


def url_of(server: Any) -> str:
    return server.url() if callable(server.url) else str(server.url)


class Site:
    """Two clusters of one name, each in its own registry."""

    def __init__(self, servers: Servers, opened: ExitStack) -> None:
        self.keys = Keys(f"c{uuid.uuid4().hex[:12]}")
        self.servers, self._opened = servers, opened
        self.west, self.east = map(self.open, servers)
        self.joined = JoinedRegistries(lambda: {"east": self.open(servers[1], read_only=True)})

    def open(self, server: Any, read_only: bool = False) -> Registry:
        """Open one more client of the registry at a server."""
        url = url_of(server)
        made = create_registry(url, broker_url=url, keys=self.keys, clock=SystemClock(), read_only=read_only)
        return self._opened.enter_context(closing(made))


@pytest.fixture
def site(servers: Servers) -> Iterator[Site]:
    with ExitStack() as opened:
        yield Site(servers, opened)


def test_the_nodes_of_another_registry_are_seen_with_their_zone_and_load(site: Site) -> None:
    site.west.register(node("n1", "west"))
    site.east.register(node("n1", "east", held=2))
    (east,) = site.joined.read()
    assert east.name == "east"
    assert [(each.id, each.zone, each.load.current_connections) for each in east.nodes] == [("n1", "east", 2)]
    # The one of the same name at home is another node, and the own registry knows no other.
    assert [each.zone for each in site.west.list()] == ["west"]


def test_what_changes_in_either_is_told_with_the_name_of_its_cluster(site: Site) -> None:
    both = JoinedRegistries(lambda: {OWN: site.west, **site.joined.registries})
    stop = Event()
    told = both.watch(stop)
    site.west.register(node("a", "west"))
    site.east.register(node("a", "east"))
    seen = {(event.name, event.event.type, event.event.node.zone) for event in (next(told), next(told))}
    assert seen == {(OWN, EventType.JOINED, "west"), ("east", EventType.JOINED, "east")}
    site.east.set_status("a", NodeStatus.DRAINING)
    updated = next(told)
    assert (updated.name, updated.event.type, updated.event.node.status) == ("east", EventType.UPDATED, "draining")
    site.east.deregister("a", "1-a")
    left = next(told)
    assert (left.name, left.event.type) == ("east", EventType.LEFT)
    stop.set()
    assert list(told) == []


def test_an_outage_of_the_other_is_told_and_ends_with_it(site: Site) -> None:
    site.west.register(node("w", "west"))
    site.east.register(node("e", "east"))
    stop = Event()
    told = site.joined.watch(stop)
    assert next(told).event.node.id == "e"
    site.servers[1].stop()
    try:
        (east,) = site.joined.read()
        assert east.away
        assert not east.nodes
        assert [each.id for each in site.west.list()] == ["w"]
    finally:
        site.servers[1].start()
    wait_until(lambda: not site.joined.read()[0].away, END_S, "it answers again")

    def joins() -> bool:
        try:
            site.east.register(node("later", "east"))
        except RegistryUnavailable:
            return False
        return True

    wait_until(joins, END_S, "it takes nodes again")
    ids = set()
    while "later" not in ids:
        ids.add(next(told).event.node.id)
    stop.set()
    assert list(told) == []


def test_who_may_only_read_in_redis_can_look_and_nothing_is_written(redis_server: RedisServer) -> None:
    with connect(redis_server.url) as client:
        rights = ("~*", "+@read", "+@connection", "+@transaction")
        client.execute_command("ACL", "SETUSER", "looker", "on", ">secret", *rights)
    url = redis_server.url.replace("redis://", "redis://looker:secret@")
    with (
        closing(create_registry(url, broker_url=url, keys=KEYS, clock=SystemClock(), read_only=True)) as reader,
        closing(create_registry(redis_server.url, broker_url=redis_server.url, keys=KEYS, clock=SystemClock())) as own,
    ):
        joined, stop = JoinedRegistries(lambda: {"east": reader}), Event()
        assert joined.read()[0].away == ""
        told = joined.watch(stop)
        # Nobody has ever registered there, and the first one is seen all the same.
        own.register(node("first", "east"))
        assert next(told).event.node.id == "first"
        own.register(node("second", "east"))
        assert next(told).event.node.id == "second"
        own.deregister("first", "1-a")
        assert next(told).event.type is EventType.LEFT
        stop.set()
        assert list(told) == []


def test_who_may_only_read_in_consul_can_look(tmp_path: Path) -> None:
    with ConsulServer(tmp_path, acl=True) as server:
        token = server.token('key_prefix "cluster-tasks/" { policy = "read" }')
        with (
            closing(create_registry(server.url(token), broker_url="", keys=KEYS, clock=SystemClock())) as reader,
            closing(create_registry(server.url(server.manager), broker_url="", keys=KEYS, clock=SystemClock())) as own,
        ):
            joined, stop = JoinedRegistries(lambda: {"east": reader}), Event()
            own.register(node("n", "east"))
            assert [each.id for each in joined.read()[0].nodes] == ["n"]
            told = joined.watch(stop)
            assert next(told).event.node.id == "n"
            own.deregister("n", "1-a")
            assert next(told).event.type is EventType.LEFT
            stop.set()
            assert list(told) == []


def test_another_datacentre_of_consul_is_read_through_the_agent_here(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    here = {"datacenter": "west", "ports": {"serf_wan": ports[0]}}
    there = {"datacenter": "east", "ports": {"serf_wan": ports[1]}, "retry_join_wan": [f"{HOST}:{ports[0]}"]}
    with (
        ConsulServer(tmp_path / "west", settings=here) as west,
        ConsulServer(tmp_path / "east", settings={**there, "retry_interval_wan": "1s"}) as east,
        closing(create_registry(east.url(), broker_url="", keys=KEYS, clock=SystemClock())) as own,
        closing(create_registry(west.url(datacenter="east"), broker_url="", keys=KEYS, clock=SystemClock())) as through,
    ):
        own.register(node("n", "east"))
        joined, stop = JoinedRegistries(lambda: {"east": through}), Event()
        wait_until(lambda: joined.read()[0].nodes, END_S, "the datacentres know each other")
        told = joined.watch(stop)
        assert next(told).event.node.zone == "east"
        own.deregister("n", "1-a")
        assert next(told).event.type is EventType.LEFT
        stop.set()
        assert list(told) == []


# A cluster, and another one that is joined to its view.


@pytest.fixture
def other(redis_binary: str, tmp_path: Path) -> Iterator[Broker]:
    """Another cluster, whose nodes this one could mistake for dead: they have never beaten here."""
    with redis_for_results(tmp_path / "other") as server, closing(Broker(server.url)) as broker:
        yield broker


def dump(broker: Broker) -> dict[bytes, bytes]:
    """All that is in a Redis."""
    names: Any = broker.client.keys("*")
    return {name: broker.client.dump(name) for name in names}


def test_nothing_that_this_cluster_does_touches_a_joined_one(redis_url: str, other: Broker) -> None:
    theirs = f"redis://{address_of(other)}"
    there = create_registry(theirs, broker_url=theirs, keys=KEYS, clock=SystemClock())
    epoch = other.open("gpu@there", "llm", "retrieval", zone="east")
    worker = node("gpu@there", "east", epoch=epoch)
    there.register(worker.model_copy(update={"roles": frozenset({NodeRole.WORKER, NodeRole.CACHE})}))
    other.publish("job", "gpu@there", "llm")
    before = dump(other)
    with Celery("west", set_as_current=False, broker=redis_url) as app:
        app.conf.cluster_registry_join = {"east": theirs}
        cluster = Cluster(app)
        own = cluster.epochs.open("gpu@here", ["llm"])
        cluster.registry.register(node("gpu@here", "west", epoch=str(own)))
        assert [(each.name, [node.id for node in each.nodes]) for each in cluster.joined.read()] == [
            ("east", ["gpu@there"])
        ]
        # What coordinators, agents and callers do all day.
        assert [each.id for each in cluster.nodes()] == ["gpu@here"]
        cluster.health.act([*cluster.health.observe(), Silent("gpu@there", cluster.epochs.beats()["gpu@here"], 9.0)])
        cluster.health.reap()
        cluster.evacuation.move_orphans()
        cluster.rebalance()
        cluster.plan_shards_in_turn()
        cluster.eject_outliers(at_once=True)
        cluster.view.refresh()
        assert {each.id for each in cluster.view.nodes()} == {"gpu@here"}
    there.close()
    assert dump(other) == before


def test_a_caller_is_told_where_a_slot_is_free(redis_url: str, other: Broker) -> None:
    theirs = f"redis://{address_of(other)}"
    there = create_registry(theirs, broker_url=theirs, keys=KEYS, clock=SystemClock())
    with Celery("west", set_as_current=False, broker=redis_url) as app:
        app.conf.cluster_registry_join = {"east": theirs}
        cluster = Cluster(app)
        cluster.registry.register(node("gpu@here", "west"))
        there.register(node("gpu@there", "east"))
        wait_until(lambda: cluster.where_to("llm") == "", END_S)
        cluster.registry.register(node("gpu@here", "west", held=2))
        wait_until(lambda: cluster.where_to("llm") == "east", END_S)
        there.register(node("gpu@there", "east", held=2))
        wait_until(lambda: cluster.where_to("llm") == "", END_S)
    there.close()


def test_a_caller_is_sent_to_no_cluster_that_does_not_answer(
    redis_url: str, redis_binary: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_for_results(tmp_path / "east") as server, Celery("west", set_as_current=False, broker=redis_url) as app:
        app.conf.cluster_registry_join = {"east": server.url}
        cluster = Cluster(app)
        cluster.registry.register(node("gpu@here", "west", held=2))
        with closing(create_registry(server.url, broker_url="", keys=KEYS, clock=SystemClock())) as there:
            there.register(node("gpu@there", "east"))
        wait_until(lambda: cluster.where_to("llm") == "east", END_S)
        server.stop()
        wait_until(lambda: cluster.where_to("llm") == "", END_S)
        assert "the registry of east does not answer, so no job is sent there" in caplog.text


def address_of(broker: Broker) -> str:
    where = broker.client.connection_pool.connection_kwargs
    return f"{where['host']}:{where['port']}/{where['db']}"
