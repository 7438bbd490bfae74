"""What locks in Consul and etcd promise besides: one server of three may be lost, and a minority gives none."""

from __future__ import annotations

import re
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from cluster_tasks.addresses.consul import parse_consul_url
from cluster_tasks.addresses.etcd import parse_etcd_url
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ConfigurationError, LockLost, LocksUnavailable, LockTaken
from cluster_tasks.keys import Keys
from cluster_tasks.locks import Locks, create_locks
from cluster_tasks.locks.consul import ConsulLocks
from cluster_tasks.locks.etcd import EtcdLocks
from cluster_tasks.registry import create_registry
from tests.consul_server import ConsulCluster, ConsulServer
from tests.contract.locking import END_S, ConsulStage, EtcdStage, open_consul, open_etcd
from tests.etcd_server import EtcdServer, etcd_cluster
from tests.process.proxy import wire_to
from tests.waiting import wait_until

T = TypeVar("T")


class Server(Protocol):
    """One of three."""

    def kill(self) -> None: ...


class Three(Protocol):
    """Three servers."""

    def leader(self) -> Server:
        """The one that leads."""

    def rest(self) -> list[Server]:
        """Those that do not."""

    def url(self) -> str:
        """By which a client reaches one that is not the leader now, or all."""


class ThreeOfEtcd:
    """A cluster of etcd."""

    def __init__(self, servers: list[EtcdServer]) -> None:
        self._servers = servers

    def leader(self) -> EtcdServer:
        servers = self._servers
        return wait_until(
            lambda: next((server for server in servers if server.is_leader), None), END_S, "one of three leads"
        )

    def rest(self) -> list[EtcdServer]:
        leader = self.leader()
        return [server for server in self._servers if server is not leader]

    def url(self) -> str:
        return f"etcd://{','.join(server.address for server in self._servers)}/test"


class ThreeOfConsul:
    """A cluster of Consul."""

    def __init__(self, cluster: ConsulCluster) -> None:
        self._cluster = cluster

    def leader(self) -> ConsulServer:
        return self._cluster.leader

    def rest(self) -> list[ConsulServer]:
        leader = self.leader()
        return [server for server in self._cluster.servers if server is not leader]

    def url(self) -> str:
        return self.rest()[0].url()


@pytest.fixture(params=["consul", "etcd"])
def three(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Three]:
    if request.param == "consul":
        with ConsulCluster(tmp_path) as cluster:
            yield ThreeOfConsul(cluster)
    else:
        with etcd_cluster(tmp_path) as servers:
            yield ThreeOfEtcd(servers)


@pytest.fixture
def open_locks(three: Three) -> Iterator[Callable[[], Locks]]:
    """Opens clients as processes on several machines would."""
    url = three.url()
    with ExitStack() as opened:
        yield lambda: opened.enter_context(
            closing(create_locks(url, broker_url="", keys=Keys("contract"), clock=SystemClock()))
        )


def patiently(call: Callable[[], T]) -> T:
    """Call until there is a leader."""
    done: list[T] = []

    def is_done() -> bool:
        try:
            done.append(call())
        except LocksUnavailable:
            return False
        return True

    wait_until(is_done, END_S, "there is a leader")
    return done[0]


def test_a_lock_survives_the_loss_of_the_leader(three: Three, open_locks: Callable[[], Locks]) -> None:
    first, second = open_locks(), open_locks()
    held = patiently(lambda: first.acquire("name", ttl_s=60))
    three.leader().kill()
    patiently(held.renew)
    with pytest.raises(LockTaken):
        patiently(lambda: second.acquire("name", ttl_s=60))
    patiently(held.release)
    assert patiently(lambda: second.acquire("name", ttl_s=60)).token > held.token


def test_one_server_of_three_gives_no_locks(three: Three, open_locks: Callable[[], Locks]) -> None:
    locks = open_locks()
    held = patiently(lambda: locks.acquire("name", ttl_s=60))
    leader = three.leader()
    for server in (leader, next(each for each in three.rest() if each is not leader)):
        server.kill()
    for call in (lambda: locks.acquire("other", ttl_s=60, wait_s=3600), held.renew, held.release):
        with pytest.raises(LocksUnavailable):
            call()


@pytest.mark.parametrize("kind", ["consul", "etcd"])
def test_a_lock_survives_a_restart(request: pytest.FixtureRequest, kind: str) -> None:
    server = request.getfixturevalue(f"{kind}_server")
    stage = ConsulStage(server) if kind == "consul" else EtcdStage(server)
    with closing(stage.open()) as first, closing(stage.open()) as second:
        held = first.acquire("restarted", ttl_s=60)
        stage.kill()
        stage.start()
        with pytest.raises(LockTaken):
            second.acquire("restarted", ttl_s=60)
        held.renew()
        held.release()


# In etcd


@pytest.fixture
def in_etcd(etcd_server: EtcdServer) -> Iterator[Locks]:
    with closing(open_etcd(etcd_server.url)) as locks:
        yield locks


def leases(server: EtcdServer) -> list[object]:
    return list(server.ask("lease/leases").get("leases", []))


def test_a_key_that_somebody_deleted_in_etcd_is_a_lost_lock(etcd_server: EtcdServer, in_etcd: Locks) -> None:
    old = in_etcd.acquire("name", ttl_s=60)
    etcd_server.empty()
    with pytest.raises(LockLost):
        old.renew()
    new = in_etcd.acquire("name", ttl_s=60)
    assert new.token > old.token
    with pytest.raises(LockLost):
        old.release()
    new.renew()


def test_nothing_is_left_in_etcd_of_a_lock_that_was_released_or_not_given(
    etcd_server: EtcdServer, in_etcd: Locks
) -> None:
    before = leases(etcd_server)
    with in_etcd.acquire("name", ttl_s=60), pytest.raises(LockTaken):
        in_etcd.acquire("name", ttl_s=60)
    assert leases(etcd_server) == before
    everything = b64encode(b"\0").decode()
    assert "kvs" not in etcd_server.ask("kv/range", key=everything, range_end=everything)


def test_two_that_find_a_lock_free_in_etcd_do_not_both_get_it(etcd_server: EtcdServer) -> None:
    before = len(leases(etcd_server))
    stores = [EtcdLocks(parse_etcd_url(etcd_server.url), Keys("contract")) for _ in range(8)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for number in range(10):
            granted = list(pool.map(lambda store, name=f"n{number}": store.take(name, 60), stores))
            assert sum(grant is not None for grant in granted) == 1
    # What lost the race has left no lease, what won has one.
    assert len(leases(etcd_server)) == before + 10
    for store in stores:
        store.close()


def test_a_server_of_etcd_that_is_alone_is_not_believed_whose_a_lock_is(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = stack.enter_context(etcd_cluster(tmp_path))
        store = EtcdLocks(parse_etcd_url(ThreeOfEtcd(servers).url()), Keys("contract"))
        stack.callback(store.close)
        grant = store.take("name", 60)
        assert grant is not None
        assert store._is_ours(grant)
        for server in servers[:2]:
            server.kill()
        # What it knows may be out of date. All that asks it this needs the others for something else as well.
        with pytest.raises(LocksUnavailable):
            store._is_ours(grant)


def test_a_lock_in_etcd_is_released_though_an_answer_is_lost(etcd_server: EtcdServer) -> None:
    before = leases(etcd_server)
    with wire_to(etcd_server.port) as wire:
        url = f"etcd://127.0.0.1:{wire.port},{etcd_server.address}/test"
        with closing(open_etcd(url)) as locks:
            held = locks.acquire("name", ttl_s=60)
            # That of whether it is ours arrives.
            wire.cut_replies(after=1)
            held.release()
            assert wire.cut == 1
    assert leases(etcd_server) == before


def test_a_user_that_lacks_is_named(tmp_path: Path) -> None:
    with EtcdServer(tmp_path) as server:
        server.demand_users()
        with closing(open_etcd(server.url)) as locks, pytest.raises(LocksUnavailable, match="the URL names none"):
            locks.acquire("name", ttl_s=60)


def test_without_their_library_locks_in_etcd_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'cluster-tasks[etcd]'")):
        create_locks("etcd://host/test", broker_url="", keys=Keys(), clock=SystemClock())


def test_a_url_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"etcd:// URL: unknown option 'tll'; did you mean 'ttl'"):
        create_locks("etcd://host/test?tll=3s", broker_url="", keys=Keys(), clock=SystemClock())


# In Consul


@pytest.fixture
def in_consul(consul_server: ConsulServer) -> Iterator[Locks]:
    with closing(open_consul(consul_server.url())) as locks:
        yield locks


def sessions(server: ConsulServer) -> set[str]:
    return {session["ID"] for session in server.api("GET", "/v1/session/list")}


def test_a_key_that_somebody_deleted_in_consul_is_a_lost_lock(consul_server: ConsulServer, in_consul: Locks) -> None:
    old = in_consul.acquire("deleted", ttl_s=60)
    consul_server.api("DELETE", "/v1/kv/cluster-tasks/contract/locks/deleted")
    with pytest.raises(LockLost):
        old.renew()
    new = in_consul.acquire("deleted", ttl_s=60)
    assert new.token > old.token
    with pytest.raises(LockLost):
        old.release()
    new.renew()


def test_nothing_is_left_in_consul_of_a_lock_that_was_released_or_not_given(
    consul_server: ConsulServer, in_consul: Locks
) -> None:
    in_consul.acquire("held", ttl_s=60)
    before = sessions(consul_server)
    with in_consul.acquire("left", ttl_s=60), pytest.raises(LockTaken):
        in_consul.acquire("left", ttl_s=60)
    assert sessions(consul_server) == before
    assert "cluster-tasks/contract/locks/left" not in consul_server.api("GET", "/v1/kv/cluster-tasks/?keys")


def test_two_that_find_a_lock_free_in_consul_do_not_both_get_it(consul_server: ConsulServer) -> None:
    before = sessions(consul_server)
    stores = [ConsulLocks(parse_consul_url(consul_server.url()), Keys("contract")) for _ in range(8)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for number in range(10):
            granted = list(pool.map(lambda store, name=f"n{number}": store.take(name, 60), stores))
            assert sum(grant is not None for grant in granted) == 1
    assert len(sessions(consul_server) - before) == 10
    for store in stores:
        store.close()


def test_who_was_silent_too_long_in_consul_is_followed_after_a_delay(
    consul_server: ConsulServer, in_consul: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster_tasks.locks.consul.LOCK_DELAY_S", 5)
    held = in_consul.acquire("delayed", ttl_s=60)
    ended = consul_server.api("GET", "/v1/kv/cluster-tasks/contract/locks/delayed")[0]["Session"]
    # Only silence ends it, not what the agent's neighbours think of the agent.
    assert consul_server.api("GET", f"/v1/session/info/{ended}")[0]["NodeChecks"] == []
    consul_server.api("PUT", f"/v1/session/destroy/{ended}")
    with pytest.raises(LockTaken):
        in_consul.acquire("delayed", ttl_s=60)
    assert in_consul.acquire("delayed", ttl_s=60, wait_s=END_S).token > held.token


def test_a_permission_that_lacks_is_named(tmp_path: Path) -> None:
    with ConsulServer(tmp_path, acl=True) as server:
        token = server.token('key_prefix "" { policy = "write" }')
        with closing(open_consul(server.url(token))) as locks, pytest.raises(LocksUnavailable) as caught:
            locks.acquire("name", ttl_s=60)
        assert 'lacks the permission key_prefix "cluster-tasks/contract/locks/" and session_prefix' in str(caught.value)
        allowed = server.token(
            'key_prefix "cluster-tasks/contract/locks/" { policy = "write" } session_prefix "" { policy = "write" }'
        )
        with closing(open_consul(server.url(allowed))) as locks, locks.acquire("name", ttl_s=60) as held:
            held.renew()


def test_without_their_library_locks_in_consul_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cluster_tasks.locks.consul", "cluster_tasks.consul_store"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "consul", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'cluster-tasks[consul]'")):
        create_locks("consul://host", broker_url="", keys=Keys(), clock=SystemClock())


@pytest.mark.parametrize("kind", ["consul", "etcd"])
def test_a_registry_that_is_erased_leaves_the_locks_beside_it(kind: str, tmp_path: Path) -> None:
    keys, clock = Keys("erased"), SystemClock()
    with ConsulServer(tmp_path) if kind == "consul" else EtcdServer(tmp_path) as server:
        url = server.url() if isinstance(server, ConsulServer) else server.url
        registry = create_registry(url, broker_url=url, keys=keys, clock=clock)
        locks = create_locks(url, broker_url=url, keys=keys, clock=clock)
        with closing(registry), closing(locks), locks.acquire("shard 1", 60):
            registry.erase()
            with pytest.raises(LockTaken):
                locks.acquire("shard 1", 60)
