"""What the registry in etcd promises besides: outages, histories that end, several servers."""

from __future__ import annotations

import logging
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import pytest

from cluster_tasks.errors import NodeNotFound, RegistryUnavailable
from cluster_tasks.etcd_store import TIMEOUT_S
from cluster_tasks.model import Load, NodeStatus
from cluster_tasks.registry.etcd import EtcdRegistry
from tests.contract.etcds import LOST, PATIENCE_S, patiently, registry_at
from tests.contract.test_registry import (
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
)
from tests.etcd_server import KEPT, EtcdServer, etcd_cluster
from tests.process.proxy import Cut, wire_to
from tests.waiting import wait_until

# Outages


def test_every_call_during_an_outage_raises_registry_unavailable(own_etcd: EtcdServer) -> None:
    with closing(registry_at(own_etcd.url)) as registry:
        registry.register(RICH)
        own_etcd.stop()
        for call in calls(registry):
            with pytest.raises(RegistryUnavailable):
                call()
        own_etcd.start()
        assert registry.get(RICH.id) == RICH


def test_a_watch_goes_on_where_it_was_after_an_outage_and_warns_once_of_each(
    own_etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    with closing(registry_at(own_etcd.url)) as registry:
        registry.register(node("first"))
        with Watcher(registry) as watcher:
            watcher.wait_for("joined first/1")
            for outage in ("1", "2"):
                own_etcd.stop()
                watcher.stop.waits = 0
                wait_until(lambda: watcher.stop.waits >= 3, WAIT_S, "the watch tries again")
                own_etcd.start()
                come_and_go(registry, "guest", [outage])
                watcher.wait_for(f"left guest/{outage}")
    assert watcher.told == ["joined first/1", *(f"{what} guest/{n}" for n in "12" for what in ("joined", "left"))]
    assert [record.message for record in caplog.records] == [LOST] * 2


@pytest.mark.parametrize("writes", [0, 100], ids=["a younger history", "a longer history"])
def test_a_watch_of_an_etcd_that_came_back_empty_tells_the_difference(own_etcd: EtcdServer, writes: int) -> None:
    with closing(registry_at(f"{own_etcd.url}?{KEPT}")) as registry:
        events = watch_from_now(registry)
        for each in (node("a"), node("b"), node("c"), RICH):
            registry.register(each)
        assert len(take(events, 4)) == 4
        own_etcd.stop()
        own_etcd.wipe()
        own_etcd.start()
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


def test_a_watch_whose_history_was_compacted_tells_the_difference(own_etcd: EtcdServer) -> None:
    with closing(registry_at(f"{own_etcd.url}?{KEPT}")) as registry:
        events = watch_from_now(registry)
        registry.register(node("a"))
        assert take(events, 1) == ["joined a/1"]
        own_etcd.stop()
        own_etcd.start()
        come_and_go(registry, "guest", "12")
        registry.deregister("a", "1")
        registry.register(node("b"))
        own_etcd.compact()
        assert take(events, 2) == ["left a/1", "joined b/1"]
        assert rest(registry, events) == []


def watches_begun(server: EtcdServer) -> int:
    return server.metric("grpc_server_started_total", 'grpc_method="Watch"')


def test_a_watch_of_an_empty_etcd_misses_no_first_node_through_an_outage(own_etcd: EtcdServer) -> None:
    with (
        wire_to(own_etcd.port) as wire,
        closing(registry_at(f"etcd://127.0.0.1:{wire.port}/test")) as far,
        closing(registry_at(f"{own_etcd.url}?{KEPT}")) as near,
        Watcher(far) as watcher,
    ):
        wait_until(lambda: watches_begun(own_etcd), WAIT_S, "the watch has begun")
        wire.freeze()
        expected = come_and_go(near, "guest", "12")
        near.register(node("last"))
        wire.thaw()
        wait_until(lambda: "joined last/1" in watcher.told, PATIENCE_S, "the watch goes on")
    assert watcher.told == [*expected, "joined last/1"]


def test_a_watch_of_an_etcd_without_nodes_notices_that_it_was_replaced(own_etcd: EtcdServer) -> None:
    for _ in range(20):
        own_etcd.ask("kv/put", key="eA==", value="eA==")
    with (
        wire_to(own_etcd.port) as wire,
        closing(registry_at(f"etcd://127.0.0.1:{wire.port}/test")) as far,
        closing(registry_at(f"{own_etcd.url}?{KEPT}")) as near,
        Watcher(far) as watcher,
    ):
        wait_until(lambda: watches_begun(own_etcd), WAIT_S, "the watch has begun")
        wire.freeze()
        own_etcd.stop()
        own_etcd.wipe()
        own_etcd.start()
        near.register(node("first"))
        for _ in range(30):
            near.beat("first", LOADED, NodeStatus.ONLINE)
        wire.thaw()
        wait_until(lambda: watcher.told, PATIENCE_S, "the watch looks at what is there now")
    assert watcher.told == ["joined first/1"]


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
    own_etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(registry_at(f"{own_etcd.url}?ttl=10m")) as registry:
        registry.register(RICH)
        with Watcher(registry) as watcher:
            watcher.wait_for(f"joined {RICH.id}/{RICH.epoch}")
            with own_etcd.paused():
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
        # Nobody beats the first node: on a busy machine this takes longer than a lease.
        closing(registry_at(f"etcd://127.0.0.1:{wire.port}/test?ttl=600")) as far,
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


@pytest.mark.parametrize("request_number", range(1, 6))
def test_a_request_that_is_done_twice_since_its_answer_was_lost_changes_nodes_once(
    etcd_server: EtcdServer, request_number: int
) -> None:
    with wire_to(etcd_server.port) as wire, closing(registry_at(etcd_server.url)) as watched:
        events = watch_from_now(watched)
        # A node registers with three requests and deregisters with two; each in turn loses its answer.
        with closing(registry_at(f"etcd://127.0.0.1:{wire.port},{etcd_server.address}/test")) as registry:
            wire.cut_replies(after=request_number - 1)
            expected = come_and_go(registry, "guest", "1")
        assert wire.cut == 1
        assert rest(watched, events) == expected


def test_a_server_that_hangs_is_waited_for_once(etcd_server: EtcdServer) -> None:
    with (
        wire_to(etcd_server.port) as wire,
        closing(registry_at(f"etcd://127.0.0.1:{wire.port},{etcd_server.address}/test")) as registry,
    ):
        registry.register(RICH)
        wire.freeze()
        began_s = monotonic()
        for _ in range(20):
            assert registry.get(RICH.id) == RICH
        assert TIMEOUT_S <= monotonic() - began_s < 10 * TIMEOUT_S


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
def test_a_watch_that_a_fork_has_copied_ends_in_one_process(
    etcd_server: EtcdServer, in_etcd: EtcdRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody takes from it until the child has ended.
    monkeypatch.setattr("cluster_tasks.etcd_store.SILENCE_S", 600.0)
    events = watch_from_now(in_etcd)
    in_etcd.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    before = watches_begun(etcd_server)
    child = get_context("fork").Process(target=events.close)
    child.start()
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert rest(in_etcd, events) == []
    assert watches_begun(etcd_server) == before


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
