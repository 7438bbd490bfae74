"""What the registry in etcd promises besides: leases, users, TLS, costs, neighbours."""

from __future__ import annotations

import re
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from time import monotonic

import pytest

from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ConfigurationError, NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import Load, NodeStatus
from cluster_tasks.registry import create_registry
from cluster_tasks.registry.etcd import EtcdRegistry
from tests.certificates import make_certificate
from tests.contract.etcds import LOST, PATIENCE_S, registry_at
from tests.contract.test_registry import (
    KEYS,
    LOADED,
    RICH,
    WAIT_S,
    Watcher,
    calls,
    come_and_go,
    node,
    rest,
    take,
    watch_from_now,
)  # fmt: skip
from tests.etcd_server import EtcdServer
from tests.waiting import wait_until

# Leases


def test_a_node_that_does_not_beat_leaves_with_its_lease_and_joins_again(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"{etcd_server.url}?ttl=2s")) as registry, Watcher(registry) as watcher:
        registry.register(RICH)
        watcher.wait_for(f"left {RICH.id}/{RICH.epoch}")
        assert registry.list() == []
        with pytest.raises(NodeNotFound):
            registry.beat(RICH.id, LOADED, NodeStatus.ONLINE)
        registry.register(RICH)
        wait_until(lambda: len(watcher.events) == 3, WAIT_S, "it joins again")
    assert [event.node for event in watcher.events] == [RICH] * 3


def test_beats_keep_a_node_for_longer_than_its_lease(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"{etcd_server.url}?ttl=5s")) as owner, closing(registry_at(etcd_server.url)) as other:
        owner.register(RICH)
        began_s = monotonic()
        with Watcher(other) as watcher:
            while monotonic() - began_s < 12:
                owner.beat(RICH.id, LOADED, RICH.status)
                Event().wait(0.5)
            assert watcher.told == [f"joined {RICH.id}/{RICH.epoch}"]


def test_a_status_set_by_another_process_leaves_the_node_under_its_lease(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"{etcd_server.url}?ttl=6s")) as owner, closing(registry_at(etcd_server.url)) as other:
        events = watch_from_now(other)
        owner.register(node("a"))
        other.set_status("a", NodeStatus.DRAINING)
        assert take(events, 3) == ["joined a/1", "updated a/1", "left a/1"]


def test_what_is_kept_of_nodes_that_went_goes_with_their_leases(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"{etcd_server.url}?ttl=2s")) as registry:
        come_and_go(registry, "guest", "12")

        def keys() -> int:
            return int(etcd_server.ask("kv/range", key=b64encode(b"\0").decode(), range_end="AA==")["count"])

        wait_until(lambda: keys() == 1, WAIT_S, "only the mark of the store is left")


# Users


@contextmanager
def user(server: EtcdServer) -> Iterator[str]:
    """A server that wants a user, and the URL of one who may do everything below the prefix."""
    server.ask("auth/role/add", name="cluster")
    grant(server)
    server.ask("auth/user/add", name="celery", password="s3/cr@t")
    server.ask("auth/user/grant", user="celery", role="cluster")
    server.demand_users()
    yield f"etcd://celery:s3%2Fcr%40t@{server.address}/test"


def grant(server: EtcdServer) -> None:
    first, end = b64encode(b"/test/").decode(), b64encode(b"/test0").decode()
    server.ask("auth/role/grant", name="cluster", perm={"permType": "READWRITE", "key": first, "range_end": end})


def test_a_user_whose_permission_is_revoked_is_told_so_and_goes_on_when_it_is_back(
    own_etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    with user(own_etcd) as url, closing(registry_at(url)) as registry:
        registry.register(RICH)
        with Watcher(registry) as watcher:
            watcher.wait_for(f"joined {RICH.id}/{RICH.epoch}")
            first, end = b64encode(b"/test/").decode(), b64encode(b"/test0").decode()
            own_etcd.ask("auth/role/revoke", role="cluster", key=first, range_end=end)
            for call in calls(registry):
                with pytest.raises(RegistryUnavailable, match=r"permission denied: user 'celery' must .* below /test/"):
                    call()
            wait_until(lambda: caplog.records, PATIENCE_S, "the watch says so")
            grant(own_etcd)
            registry.register(node("last"))
            watcher.wait_for("joined last/1")
    assert [record.message for record in caplog.records] == [LOST]
    assert "s3" not in caplog.text


def test_a_token_that_a_restart_forgot_is_renewed(own_etcd: EtcdServer) -> None:
    with user(own_etcd) as url, closing(registry_at(url)) as registry:
        events = watch_from_now(registry)
        own_etcd.stop()
        own_etcd.start()
        assert rest(registry, events) == []
        assert [each.id for each in registry.list()] == ["first", "last"]


def test_a_missing_user_and_a_wrong_password_are_told_and_the_password_is_not(own_etcd: EtcdServer) -> None:
    with user(own_etcd) as url:
        with closing(registry_at(own_etcd.url)) as registry, pytest.raises(RegistryUnavailable, match="wants a user"):
            registry.list()
        with closing(registry_at(url.replace("s3", "wrong"))) as registry:
            with pytest.raises(RegistryUnavailable, match="refuses user 'celery'") as error:
                registry.list()
            assert "cr@t" not in f"{error.value}{error.value.__cause__!r}{vars(registry)}{vars(registry._store)}"


def test_a_user_is_no_harm_where_etcd_wants_none(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"etcd://celery:secret@{etcd_server.address}/test")) as registry:
        registry.register(RICH)
        assert registry.list() == [RICH]


# TLS


@pytest.fixture
def identity(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a certificate for the loopback and of its key."""
    return make_certificate(tmp_path)


def test_tls_knows_the_server_by_its_authority_and_the_client_by_its_certificate(
    tmp_path: Path, identity: tuple[Path, Path]
) -> None:
    certificate, key = identity
    with EtcdServer(tmp_path / "etcd", identity=identity) as server:
        trusting = f"{server.url}?scheme=https&ca={certificate}"
        with closing(registry_at(f"{trusting}&cert={certificate}&key={key}")) as registry:
            events = watch_from_now(registry)
            registry.register(RICH)
            assert next(events).node == RICH
        for url in (f"{server.url}?scheme=https&cert={certificate}&key={key}", trusting, server.url):
            with closing(registry_at(url)) as registry, pytest.raises(RegistryUnavailable):
                registry.list()


# Costs


def test_a_list_of_200_nodes_is_one_request(etcd_server: EtcdServer, in_etcd: EtcdRegistry) -> None:
    for number in range(200):
        in_etcd.register(RICH.model_copy(update={"id": f"n{number}"}))
    before = etcd_server.metric("grpc_server_started_total")
    assert len(in_etcd.list()) == 200
    assert etcd_server.metric("grpc_server_started_total") == before + 1


def test_beats_do_not_wake_a_watch(etcd_server: EtcdServer, in_etcd: EtcdRegistry) -> None:
    events = watch_from_now(in_etcd)
    in_etcd.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    before = etcd_server.metric("etcd_debugging_mvcc_events_total")
    for number in range(100):
        in_etcd.beat("a", Load(queue_length=number), NodeStatus.ONLINE)
    in_etcd.beat("a", LOADED, NodeStatus.BUSY)
    assert take(events, 1) == ["updated a/1"]
    assert etcd_server.metric("etcd_debugging_mvcc_events_total") == before + 1


# Neighbours


def test_clusters_in_one_etcd_do_not_see_each_other(etcd_server: EtcdServer, in_etcd: EtcdRegistry) -> None:
    urls = [(etcd_server.url, "other"), (f"{etcd_server.url}2", "contract"), (f"{etcd_server.url}/contract", "nodes2")]
    for url, name in urls:
        with closing(registry_at(url, Keys(name))) as other:
            ours, theirs = watch_from_now(in_etcd), watch_from_now(other)
            in_etcd.register(node("a"))
            other.register(node("b"))
            assert [each.id for each in in_etcd.list()] == ["a", "first"]
            with pytest.raises(NodeNotFound):
                other.get("a")
            assert rest(in_etcd, ours) == ["joined a/1"]
            assert rest(other, theirs) == ["joined b/1"]
            for node_id in ("a", "first", "last"):
                in_etcd.deregister(node_id, "1")


@pytest.mark.parametrize(("prefix", "name"), [("test/contract", "nodes"), ("test/contract/loads/x", "contract")])
def test_a_name_that_would_mix_two_clusters_is_refused(prefix: str, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'(nodes|loads)' cannot be"):
        registry_at(f"etcd://host/{prefix}", Keys(name))


def test_an_unreadable_record_hides_no_other_node_and_is_warned_of_once(
    etcd_server: EtcdServer, in_etcd: EtcdRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    events = watch_from_now(in_etcd)
    key, value = (
        b64encode(text).decode() for text in (b"/test/contract/nodes/new", b'{"node": {"id": "new", "port": -1}}')
    )
    etcd_server.ask("kv/put", key=key, value=value)
    etcd_server.ask("kv/put", key=key, value=value)
    assert [each.id for each in in_etcd.list()] == ["first"]
    assert rest(in_etcd, events) == []
    assert [vars(record)["node"] for record in caplog.records] == ["new"]
    in_etcd.register(node("new"))
    assert in_etcd.get("new") == node("new")


def test_a_registry_that_is_closed_leaves_its_watches_alone(
    in_etcd: EtcdRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    in_etcd.register(node("first"))
    with Watcher(in_etcd) as watcher:
        watcher.wait_for("joined first/1")
        in_etcd.close()
        in_etcd.register(node("last"))
        watcher.wait_for("joined last/1")
    assert caplog.records == []


def test_without_its_library_the_registry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'cluster-tasks[etcd]'")):
        create_registry("etcd://host/test", broker_url="", keys=KEYS, clock=SystemClock())
