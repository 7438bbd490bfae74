"""What the registry in etcd promises besides: its own faults, and what it costs."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from time import monotonic

import pytest
import requests

from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ConfigurationError, NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import Load, NodeStatus
from cluster_tasks.registry import Registry, create_registry
from cluster_tasks.registry.etcd import EtcdRegistry
from tests.contract.test_registry import (
    KEYS,
    LOADED,
    RICH,
    WAIT_S,
    Watcher,
    come_and_go,
    node,
    rest,
    take,
    watch_from_now,
)  # fmt: skip
from tests.etcd_server import EtcdServer, etcd_cluster
from tests.process.proxy import Cut, wire_to
from tests.servers import missing
from tests.waiting import wait_until

PATIENCE_S = 60.0
"""For an election, or for a server that hangs to be given up: seconds on a machine of one's own."""
LOST = "registry lost, the watch goes on when it answers"


def registry_at(url: str, keys: Keys = KEYS) -> EtcdRegistry:
    return EtcdRegistry(url, keys, SystemClock())


@pytest.fixture
def in_etcd(etcd_server: EtcdServer) -> Iterator[EtcdRegistry]:
    with closing(registry_at(etcd_server.url)) as registry:
        yield registry


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server whose users and data no other test meets."""
    with EtcdServer(tmp_path) as server:
        yield server


def calls(registry: Registry) -> list[Callable[[], object]]:
    return [
        lambda: registry.register(RICH),
        lambda: registry.beat(RICH.id, LOADED, NodeStatus.ONLINE),
        lambda: registry.deregister(RICH.id, RICH.epoch),
        lambda: registry.get(RICH.id),
        lambda: registry.list(),
        lambda: registry.set_status(RICH.id, NodeStatus.ONLINE),
    ]


def patiently(call: Callable[[], object]) -> None:
    """Do what may be done twice until it succeeds."""

    def done() -> bool:
        try:
            call()
        except RegistryUnavailable:
            return False
        return True

    wait_until(done, PATIENCE_S, "the registry answers")


def metric(server: EtcdServer, name: str, label: str = "") -> int:
    """The sum of the values of a counter of the server whose labels contain ``label``."""
    text = requests.get(f"http://{server.address}/metrics", timeout=5).text
    lines = re.findall(rf"^{name}({{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(int(float(value)) for labels, value in lines if label in labels)


# Outages


def test_every_call_during_an_outage_raises_registry_unavailable(own_server: EtcdServer) -> None:
    with closing(registry_at(own_server.url)) as registry:
        registry.register(RICH)
        own_server.stop()
        for call in calls(registry):
            with pytest.raises(RegistryUnavailable):
                call()
        own_server.start()
        assert registry.get(RICH.id) == RICH


def test_a_watch_goes_on_where_it_was_after_an_outage_and_warns_once_of_each(
    own_server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    with closing(registry_at(own_server.url)) as registry:
        registry.register(node("first"))
        with Watcher(registry) as watcher:
            watcher.wait_for("joined first/1")
            for outage in ("1", "2"):
                own_server.stop()
                watcher.stop.waits = 0
                wait_until(lambda: watcher.stop.waits >= 3, WAIT_S, "the watch tries again")
                own_server.start()
                come_and_go(registry, "guest", [outage])
                watcher.wait_for(f"left guest/{outage}")
    assert watcher.told == ["joined first/1", *(f"{what} guest/{n}" for n in "12" for what in ("joined", "left"))]
    assert [record.message for record in caplog.records] == [LOST] * 2


@pytest.mark.parametrize("writes", [0, 100], ids=["a younger history", "a longer history"])
def test_a_watch_of_an_etcd_that_came_back_empty_tells_the_difference(own_server: EtcdServer, writes: int) -> None:
    with closing(registry_at(own_server.url)) as registry:
        events = watch_from_now(registry)
        for each in (node("a"), node("b"), node("c"), RICH):
            registry.register(each)
        assert len(take(events, 4)) == 4
        own_server.stop()
        own_server.wipe()
        own_server.start()
        with pytest.raises(NodeNotFound):
            registry.beat("a", LOADED, NodeStatus.ONLINE)
        for each in (node("a"), node("b", "2"), RICH.model_copy(update={"port": 1})):
            registry.register(each)
        for _ in range(writes):
            registry.beat("a", LOADED, NodeStatus.ONLINE)
        expected = ["left b/1", "joined b/2", "left c/1", "left first/1", f"updated {RICH.id}/{RICH.epoch}"]
        assert take(events, 5) == expected
        registry.deregister("a", "1")
        assert rest(registry, events) == ["left a/1"]


def test_a_watch_whose_history_was_compacted_tells_the_difference(own_server: EtcdServer) -> None:
    with closing(registry_at(own_server.url)) as registry:
        events = watch_from_now(registry)
        registry.register(node("a"))
        assert take(events, 1) == ["joined a/1"]
        own_server.stop()
        own_server.start()
        come_and_go(registry, "guest", "12")
        registry.deregister("a", "1")
        registry.register(node("b"))
        own_server.compact()
        assert take(events, 2) == ["left a/1", "joined b/1"]
        assert rest(registry, events) == []


def test_a_compaction_does_not_disturb_a_watch_that_is_up_to_date(
    etcd_server: EtcdServer, in_etcd: EtcdRegistry
) -> None:
    events = watch_from_now(in_etcd)
    expected = []
    for epoch in "12345":
        expected += come_and_go(in_etcd, "guest", epoch)
        assert take(events, 2) == expected[-2:]
        etcd_server.compact()
    assert rest(in_etcd, events) == []


def test_calls_on_a_server_that_hangs_end_with_an_error_and_the_watch_goes_on_afterwards(
    own_server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(registry_at(f"{own_server.url}?ttl=10m")) as registry:
        registry.register(RICH)
        with Watcher(registry) as watcher:
            watcher.wait_for(f"joined {RICH.id}/{RICH.epoch}")
            with own_server.paused():
                for call in calls(registry):
                    with pytest.raises(RegistryUnavailable, match=r"[Tt]ime"):
                        call()
                wait_until(lambda: caplog.records, PATIENCE_S, "the watch notices")
            patiently(lambda: registry.register(node("last")))
            watcher.wait_for("joined last/1")
    assert watcher.told[-1] == "joined last/1"
    assert [record.message for record in caplog.records] == [LOST]


def test_a_slow_wire_and_one_that_breaks_lose_no_event(etcd_server: EtcdServer) -> None:
    with (
        wire_to(etcd_server.port) as wire,
        closing(registry_at(f"etcd://127.0.0.1:{wire.port}/test")) as far,
        closing(registry_at(etcd_server.url)) as near,
    ):
        wire.latency_s = 0.1
        far.register(node("first"))
        with Watcher(far) as watcher:
            watcher.wait_for("joined first/1")
            expected = ["joined first/1", *come_and_go(far, "slow", "12")]
            watcher.wait_for("left slow/2")
            for number, how in enumerate((*Cut, *Cut)):
                wire.cut_replies(1, how)
                expected += come_and_go(near, how.name, [str(number)])
                watcher.wait_for(expected[-1])
            assert watcher.told == expected


def test_a_request_that_is_done_twice_for_its_answer_was_lost_changes_nodes_once(etcd_server: EtcdServer) -> None:
    with (
        wire_to(etcd_server.port) as wire,
        closing(registry_at(f"etcd://127.0.0.1:{wire.port},{etcd_server.address}/test")) as registry,
        closing(registry_at(etcd_server.url)) as watched,
    ):
        events = watch_from_now(watched)
        expected = []
        # Whichever request of them loses its answer.
        for place in range(8):
            registry._store._current = 0
            for _ in range(place):
                registry.list()
            wire.cut_replies()
            expected += come_and_go(registry, "guest", str(place))
        assert wire.cut == 8
        assert rest(watched, events) == expected


def test_an_etcd_that_is_full_says_what_to_do(tmp_path: Path) -> None:
    with (
        EtcdServer(tmp_path, options={"quota-backend-bytes": 500_000}) as server,
        closing(registry_at(server.url)) as registry,
    ):
        registry.register(RICH)

        def fill() -> bool:
            registry.beat(RICH.id, Load(trial="x" * 100_000), NodeStatus.ONLINE)
            return False

        with pytest.raises(RegistryUnavailable, match=r"etcd is full: .*--auto-compaction-retention"):
            wait_until(fill, WAIT_S, "etcd is full")
        assert [each.id for each in registry.list()] == [RICH.id]


# Python 3.12 warns of what is tested here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_watch_that_a_fork_has_copied_ends_in_one_process(etcd_server: EtcdServer, in_etcd: EtcdRegistry) -> None:
    events = watch_from_now(in_etcd)
    in_etcd.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    before = metric(etcd_server, "grpc_server_started_total", 'grpc_method="Watch"')
    child = get_context("fork").Process(target=events.close)
    child.start()
    child.join(WAIT_S)
    assert child.exitcode == 0
    assert rest(in_etcd, events) == []
    assert metric(etcd_server, "grpc_server_started_total", 'grpc_method="Watch"') == before


# Several servers


def test_a_dead_leader_ends_neither_calls_nor_watches_and_no_event_is_lost_or_told_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    with etcd_cluster(tmp_path) as servers:
        servers.sort(key=lambda server: not server.is_leader)
        url = f"etcd://{','.join(server.address for server in servers)}/test?ttl=10m"
        with closing(registry_at(url)) as registry, closing(registry_at(url)) as watched:
            registry.register(node("first"))
            with Watcher(watched) as watcher:
                watcher.wait_for("joined first/1")
                expected = ["joined first/1"]
                for number in range(2):
                    leader = next(server for server in servers if server.is_leader)
                    for step in range(6):
                        if step == 3:
                            leader.kill()
                        guest = node("guest", f"{number}-{step}")
                        patiently(lambda guest=guest: registry.register(guest))
                        patiently(lambda guest=guest: registry.deregister(guest.id, guest.epoch))
                        expected += [f"joined guest/{guest.epoch}", f"left guest/{guest.epoch}"]
                    watcher.wait_for(expected[-1])
                    patiently(lambda: registry.beat("first", LOADED, NodeStatus.ONLINE))
                    leader.start()
            assert watcher.told == expected
            assert [each.id for each in registry.list()] == ["first"]


def test_a_watch_leaves_a_server_that_is_cut_off_from_the_others(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as servers:
        follower = next(server for server in servers if not server.is_leader)
        others = [server for server in servers if server is not follower]
        url = f"etcd://{','.join(server.address for server in (follower, *others))}/test?ttl=10m"
        with (
            closing(registry_at(url)) as watched,
            closing(registry_at(f"etcd://{others[0].address}/test?ttl=10m")) as registry,
        ):
            registry.register(node("first"))
            with Watcher(watched) as watcher:
                watcher.wait_for("joined first/1")
                with follower.paused():
                    patiently(lambda: registry.register(node("guest")))
                    wait_until(lambda: "joined guest/1" in watcher.told, PATIENCE_S, "another server tells of it")
            assert watcher.told == ["joined first/1", "joined guest/1"]


# Leases


def test_a_node_that_does_not_beat_leaves_with_its_lease_and_joins_again(etcd_server: EtcdServer) -> None:
    with closing(registry_at(f"{etcd_server.url}?ttl=2s")) as registry:
        registry.register(RICH)
        with Watcher(registry) as watcher:
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
    with closing(registry_at(f"{etcd_server.url}?ttl=2s")) as owner, closing(registry_at(etcd_server.url)) as other:
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
    own_server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    with user(own_server) as url, closing(registry_at(url)) as registry:
        registry.register(RICH)
        with Watcher(registry) as watcher:
            watcher.wait_for(f"joined {RICH.id}/{RICH.epoch}")
            first, end = b64encode(b"/test/").decode(), b64encode(b"/test0").decode()
            own_server.ask("auth/role/revoke", role="cluster", key=first, range_end=end)
            for call in calls(registry):
                with pytest.raises(RegistryUnavailable, match=r"permission denied: user 'celery' must .* below /test/"):
                    call()
            wait_until(lambda: caplog.records, PATIENCE_S, "the watch says so")
            grant(own_server)
            registry.register(node("last"))
            watcher.wait_for("joined last/1")
    assert [record.message for record in caplog.records] == [LOST]
    assert "s3" not in caplog.text


def test_a_token_that_a_restart_forgot_is_renewed(own_server: EtcdServer) -> None:
    with user(own_server) as url, closing(registry_at(url)) as registry:
        events = watch_from_now(registry)
        own_server.stop()
        own_server.start()
        assert rest(registry, events) == []
        assert [each.id for each in registry.list()] == ["first", "last"]


def test_a_missing_user_and_a_wrong_password_are_told_and_the_password_is_not(own_server: EtcdServer) -> None:
    with user(own_server) as url:
        with closing(registry_at(own_server.url)) as registry, pytest.raises(RegistryUnavailable, match="wants a user"):
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
    if not shutil.which("openssl"):
        missing("openssl is not installed: it makes the certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


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
    before = metric(etcd_server, "grpc_server_started_total")
    assert len(in_etcd.list()) == 200
    assert metric(etcd_server, "grpc_server_started_total") == before + 1


def test_beats_do_not_wake_a_watch(etcd_server: EtcdServer, in_etcd: EtcdRegistry) -> None:
    events = watch_from_now(in_etcd)
    in_etcd.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    before = metric(etcd_server, "etcd_debugging_mvcc_events_total")
    for number in range(100):
        in_etcd.beat("a", Load(queue_length=number), NodeStatus.ONLINE)
    in_etcd.beat("a", LOADED, NodeStatus.BUSY)
    assert take(events, 1) == ["updated a/1"]
    assert metric(etcd_server, "etcd_debugging_mvcc_events_total") == before + 1


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
