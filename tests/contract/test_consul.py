"""What the registry in Consul promises besides, and what Consul may do to it."""

from __future__ import annotations

import logging
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ConfigurationError, NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import Load, NodeStatus
from cluster_tasks.registry import create_registry
from cluster_tasks.registry.consul import PAUSE_S, ConsulRegistry
from tests.certificates import make_certificate
from tests.consul_server import ConsulCluster, ConsulServer
from tests.contract.test_registry import (
    LOADED,
    RICH,
    WAIT_S,
    Watcher,
    calls,
    come_and_go,
    live_in_forks,
    node,
    rest,
    take,
    watch_from_now,
)
from tests.process.proxy import Cut, Wire, wire_to
from tests.waiting import wait_until
from workers.redis_server import free_port

KEYS = Keys("contract")
LOST = "registry lost, the watch goes on when it answers"
Open = Callable[..., ConsulRegistry]


@pytest.fixture
def open_consul() -> Iterator[Open]:
    """Opens registries of one cluster name by their URL; they are closed after the test."""
    keys = Keys(f"c{uuid.uuid4().hex[:12]}")
    with ExitStack() as opened:
        yield lambda url, **options: opened.enter_context(
            closing(ConsulRegistry(url, options.pop("keys", keys), SystemClock(), **options))
        )


@pytest.fixture
def in_consul(consul_server: ConsulServer, open_consul: Open) -> ConsulRegistry:
    return open_consul(consul_server.url())


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ConsulServer]:
    """A Consul that the test may stop and empty."""
    with ConsulServer(tmp_path / "consul") as server:
        yield server


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[ConsulServer]:
    """A Consul where nobody may do anything without a token."""
    with ConsulServer(tmp_path / "consul", acl=True) as server:
        yield server


def through(server: ConsulServer, wire: Wire) -> str:
    return server.url().replace(str(server.port), str(wire.port))


def services(server: ConsulServer, node_id: str = "") -> list[dict[str, Any]]:
    """What Consul's health API tells of a node: its service and how its check stands."""
    found = server.api("GET", "/v1/health/service/cluster-tasks")
    return [
        {**each["Service"], "checks": [check["Status"] for check in each["Checks"] if check["ServiceID"]]}
        for each in found
        if each["Service"]["Meta"]["node"] == node_id
    ]


def checks(server: ConsulServer, node_id: str) -> list[str]:
    return [status for service in services(server, node_id) for status in service["checks"]]


# Outages


def test_every_call_during_an_outage_raises_registry_unavailable(own_server: ConsulServer, open_consul: Open) -> None:
    registry = open_consul(own_server.url())
    registry.register(RICH)
    own_server.kill()
    for call in calls(registry):
        with pytest.raises(RegistryUnavailable):
            call()
    own_server.start()
    assert list(registry.list()) == [RICH]


def test_a_watch_goes_on_where_it_was_after_an_outage_and_warns_once_of_each(
    own_server: ConsulServer, open_consul: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    registry = open_consul(own_server.url())
    registry.register(node("first"))
    with Watcher(registry) as watcher:
        watcher.wait_for("joined first/1")
        for outage in ("1", "2"):
            own_server.stop()
            watcher.stop.waits = 0
            wait_until(lambda: watcher.stop.waits >= 3, WAIT_S, "the watch tries again")
            own_server.start()
            registry.register(node("guest", outage))
            registry.deregister("guest", outage)
            watcher.wait_for(f"left guest/{outage}")
    assert watcher.told == ["joined first/1", *(f"{what} guest/{n}" for n in "12" for what in ("joined", "left"))]
    assert [record.message for record in caplog.records] == [LOST] * 2


def test_a_watch_of_a_consul_that_came_back_empty_tells_the_difference(
    own_server: ConsulServer, open_consul: Open
) -> None:
    registry = open_consul(own_server.url())
    events = watch_from_now(registry)
    for each in (node("a"), node("b"), node("c"), RICH):
        registry.register(each)
    assert len(take(events, 4)) == 4
    own_server.stop()
    own_server.wipe()
    own_server.start()
    with pytest.raises(NodeNotFound):
        registry.beat("a", LOADED, NodeStatus.ONLINE)
    # As many events as before: their number alone would not tell.
    for each in (node("a"), node("b", "2"), node("c"), RICH.model_copy(update={"port": 1})):
        registry.register(each)
    registry.deregister("c", "1")
    expected = ["left b/1", "joined b/2", "left c/1", "left first/1", f"updated {RICH.id}/{RICH.epoch}"]
    assert take(events, 5) == expected
    registry.deregister("a", "1")
    assert rest(registry, events) == ["left a/1"]


def test_a_watch_notices_without_an_event_that_consul_was_emptied_and_counts_anew(
    own_server: ConsulServer, open_consul: Open
) -> None:
    registry = open_consul(own_server.url())
    come_and_go(registry, "guest", map(str, range(10)))
    with Watcher(registry) as watcher:
        registry.register(node("first"))
        watcher.wait_for("joined first/1")
        own_server.stop()
        own_server.wipe()
        own_server.start()
        watcher.wait_for("left first/1")
        registry.register(node("second"))
        watcher.wait_for("joined second/1")
    assert watcher.told[-3:] == ["joined first/1", "left first/1", "joined second/1"]


def test_a_watch_of_a_consul_that_was_set_back_tells_the_difference(
    consul_server: ConsulServer, in_consul: ConsulRegistry, open_consul: Open
) -> None:
    events = watch_from_now(in_consul)
    prefix = in_consul._nodes.removesuffix("nodes/")
    backup = consul_server.api("GET", f"/v1/kv/{prefix}?recurse")
    in_consul.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    consul_server.api("DELETE", f"/v1/kv/{prefix}?recurse")
    restored = [{"KV": {"Verb": "set", "Key": each["Key"], "Value": each["Value"]}} for each in backup]
    consul_server.api("PUT", "/v1/txn", restored)
    for each in "bc":
        open_consul(consul_server.url()).register(node(each))
    assert take(events, 3) == ["left a/1", "joined b/1", "joined c/1"]
    assert rest(in_consul, events) == []


def test_a_server_that_was_restarted_is_reached_by_the_next_call(own_server: ConsulServer, open_consul: Open) -> None:
    registry = open_consul(own_server.url())
    registry.register(RICH)
    own_server.stop()
    own_server.start()
    assert list(registry.list()) == [RICH]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # As Python 3.12 does of what is tested.
def test_forked_processes_do_not_talk_over_the_connection_of_their_parent(in_consul: ConsulRegistry) -> None:
    in_consul.register(node("parent"))
    live_in_forks(in_consul)
    assert len(in_consul.list()) == 5


def test_a_watch_goes_on_over_the_death_of_the_leader_and_tells_nothing_twice(
    tmp_path: Path, open_consul: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with ConsulCluster(tmp_path) as cluster:
        leader = cluster.leader
        near, other = (server for server in cluster.servers if server is not leader)
        registry, writer = open_consul(near.url()), open_consul(other.url())
        writer.register(node("first"))
        with Watcher(registry) as watcher:
            watcher.wait_for("joined first/1")
            expected = come_and_go(writer, "before", "12")
            leader.kill()
            near.wait_for_leader()
            other.wait_for_leader()
            expected += come_and_go(writer, "after", "12")
            writer.register(node("last"))
            watcher.wait_for("joined last/1")
        assert watcher.told == ["joined first/1", *expected, "joined last/1"]
        assert [record.message for record in caplog.records if record.message == LOST] in ([], [LOST])
        assert [each.id for each in registry.list()] == ["first", "last"]


def test_a_consul_that_hangs_is_unavailable_and_the_watch_goes_on_when_it_answers(
    consul_server: ConsulServer, open_consul: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    writer = open_consul(consul_server.url())
    writer.register(node("first"))
    with wire_to(consul_server.port) as wire:
        registry = open_consul(through(consul_server, wire))
        with Watcher(registry) as watcher:
            watcher.wait_for("joined first/1")
            wire.freeze()
            with pytest.raises(RegistryUnavailable, match="listing the nodes: TimeoutError"):
                registry.list()
            expected = come_and_go(writer, "guest", "12")
            wait_until(lambda: caplog.records, WAIT_S, "the watch warns")
            wire.thaw()
            watcher.wait_for("left guest/2")
        assert watcher.told == ["joined first/1", *expected]
        assert [record.message for record in caplog.records] == [LOST]
        registry.close()


def test_a_slow_consul_will_do(consul_server: ConsulServer, open_consul: Open) -> None:
    with wire_to(consul_server.port) as wire:
        wire.latency_s = 0.1
        registry = open_consul(through(consul_server, wire))
        events = watch_from_now(registry)
        registry.register(RICH)
        assert registry.get(RICH.id) == RICH
        assert take(events, 1) == [f"joined {RICH.id}/{RICH.epoch}"]


@pytest.mark.parametrize("how", [Cut.CLOSED, Cut.RESET])
def test_a_change_whose_answer_was_lost_is_told_once(consul_server: ConsulServer, open_consul: Open, how: Cut) -> None:
    events = watch_from_now(open_consul(consul_server.url()))
    with wire_to(consul_server.port) as wire:
        registry = open_consul(through(consul_server, wire))
        registry.register(node("a"))
        registry.set_status("a", NodeStatus.BUSY)
        for status in (NodeStatus.DRAINING, NodeStatus.ONLINE):
            # The beat has its record at hand: the first answer after the head's is that of the change.
            wire.cut_replies(2, how)
            for _ in range(2):
                with pytest.raises(RegistryUnavailable):
                    registry.beat("a", LOADED, status)
            registry.beat("a", LOADED, status)
        assert wire.cut == 4
    told = ["joined a/1", *["updated a/1"] * 3]
    assert rest(open_consul(consul_server.url()), events) == told


def test_the_first_node_is_told_that_comes_while_a_watch_begins(own_server: ConsulServer, open_consul: Open) -> None:
    writer = open_consul(own_server.url())
    with wire_to(own_server.port) as wire:
        wire.latency_s = 0.2
        with Watcher(open_consul(through(own_server, wire))) as watcher:
            # Its list has been made, and the answer is on its way.
            wait_until(lambda: "PUT /v1/txn?consistent=1" in own_server.requests(), WAIT_S, "the watch reads the nodes")
            writer.register(node("a"))
            watcher.wait_for("joined a/1")


# Permissions


def test_a_revoked_token_is_told_and_the_watch_goes_on_with_rights_again(
    guarded_server: ConsulServer, open_consul: Open, caplog: pytest.LogCaptureFixture
) -> None:
    token = guarded_server.token(
        'key_prefix "cluster-tasks/" { policy = "write" } service_prefix "" { policy = "write" }'
    )
    registry = open_consul(guarded_server.url(token))
    registry.register(RICH)
    with Watcher(registry) as watcher:
        watcher.wait_for(f"joined {RICH.id}/{RICH.epoch}")
        guarded_server.revoke(token)
        for call in calls(registry):
            with pytest.raises(RegistryUnavailable, match="may have been revoked") as error:
                call()
            assert token not in str(error.value)
        wait_until(lambda: LOST in [record.message for record in caplog.records], WAIT_S, "the watch warns")
    assert len(watcher.told) == 1
    assert token not in caplog.text
    assert token not in repr(registry)


@pytest.mark.parametrize(
    ("rules", "lacking"),
    [
        (
            'service_prefix "" { policy = "write" }',
            'the token lacks the permission key_prefix "cluster-tasks/contract/"',
        ),
        (
            'key_prefix "cluster-tasks/" { policy = "write" }',
            'the token lacks the permission service "cluster-tasks" { policy = "write" }',
        ),
    ],
    ids=["keys", "service"],
)
def test_what_a_token_lacks_is_named(guarded_server: ConsulServer, open_consul: Open, rules: str, lacking: str) -> None:
    registry = open_consul(guarded_server.url(guarded_server.token(rules)), keys=KEYS)
    with pytest.raises(RegistryUnavailable) as error:
        registry.register(RICH)
    assert lacking in str(error.value)


def test_a_token_that_may_not_read_sees_an_outage_and_no_empty_cluster(
    guarded_server: ConsulServer, open_consul: Open
) -> None:
    open_consul(guarded_server.url(guarded_server.manager)).register(RICH)
    for token in ("", guarded_server.token('key_prefix "other/" { policy = "read" }')):
        registry = open_consul(guarded_server.url(token))
        with pytest.raises(RegistryUnavailable, match="listing the nodes: the token lacks"):
            registry.list()


def test_who_may_only_read_can_list_and_watch(guarded_server: ConsulServer, open_consul: Open) -> None:
    token = guarded_server.token('key_prefix "cluster-tasks/" { policy = "read" }')
    reader, writer = (open_consul(guarded_server.url(each)) for each in (token, guarded_server.manager))
    with Watcher(reader) as watcher:
        writer.register(node("a"))
        watcher.wait_for("joined a/1")
    assert [each.id for each in reader.list()] == ["a"]
    with pytest.raises(RegistryUnavailable, match='policy = "write"'):
        reader.set_status("a", NodeStatus.DRAINING)


# The catalog


def test_a_node_shows_in_the_catalog_and_turns_critical_without_beats(
    consul_server: ConsulServer, open_consul: Open
) -> None:
    registry = open_consul(consul_server.url(ttl="1s", tags="blue,team-a"))
    gpu = RICH.model_copy(update={"id": f"gpu-{uuid.uuid4().hex}"})
    registry.register(gpu)
    [service] = wait_until(lambda: services(consul_server, gpu.id), WAIT_S, "the service is in the catalog")
    assert (service["Address"], service["Port"]) == (gpu.address, gpu.port)
    assert {"blue", "team-a", "worker", "cache", "llm", "embedding"} < set(service["Tags"])
    assert any(tag.startswith("version=") for tag in service["Tags"])
    assert service["Meta"]["epoch"] == gpu.epoch
    wait_until(lambda: checks(consul_server, gpu.id) == ["critical"], WAIT_S, "its check turns critical")

    def beaten() -> bool:
        registry.beat(gpu.id, Load(), NodeStatus.ONLINE)
        return checks(consul_server, gpu.id) == ["passing"]

    wait_until(beaten, WAIT_S, "beats pass its check")
    registry.deregister(gpu.id, gpu.epoch)
    wait_until(lambda: not services(consul_server, gpu.id), WAIT_S, "it leaves the catalog")


def test_a_service_that_its_agent_has_forgotten_comes_back_with_the_next_beat(
    consul_server: ConsulServer, in_consul: ConsulRegistry
) -> None:
    gpu = node(f"gpu-{uuid.uuid4().hex}")
    in_consul.register(gpu)
    [service] = wait_until(lambda: services(consul_server, gpu.id), WAIT_S, "the service is in the catalog")
    consul_server.api("PUT", f"/v1/agent/service/deregister/{service['ID']}")
    wait_until(lambda: not services(consul_server, gpu.id), WAIT_S, "the agent forgets it")
    in_consul.beat(gpu.id, Load(), NodeStatus.ONLINE)
    wait_until(lambda: checks(consul_server, gpu.id) == ["passing"], WAIT_S, "the service is back")


def test_a_node_is_deregistered_through_any_agent(tmp_path: Path, open_consul: Open) -> None:
    with ConsulCluster(tmp_path) as cluster:
        one, other, _ = cluster.servers
        open_consul(one.url()).register(node("a"))
        wait_until(lambda: services(other, "a"), WAIT_S, "the service is in the catalog")
        open_consul(other.url()).deregister("a", "1")
        assert list(open_consul(one.url()).list()) == []
        # Its own agent still has it, until its check has been critical for a minute.
        assert services(other, "a")


# Costs and bounds


def test_two_hundred_nodes_are_listed_by_one_request(own_server: ConsulServer, open_consul: Open) -> None:
    registry = open_consul(own_server.url())
    nodes = [RICH.model_copy(update={"id": f"gpu{number:03}@host"}) for number in range(200)]
    for each in nodes:
        registry.register(each)
    before = len(own_server.requests())
    assert list(registry.list()) == nodes
    wait_until(lambda: len(own_server.requests()) > before, WAIT_S, "the request is in the log")
    assert own_server.requests()[before:] == ["PUT /v1/txn?consistent=1"]


def test_a_beat_is_one_write_and_one_passed_check_and_wakes_no_watcher(
    own_server: ConsulServer, open_consul: Open
) -> None:
    registry = open_consul(own_server.url())
    registry.register(node("a"))
    registry.beat("a", LOADED, NodeStatus.ONLINE)
    before = len(own_server.requests())
    for queue_length in range(20):
        registry.beat("a", Load(queue_length=queue_length), NodeStatus.ONLINE)
    wait_until(lambda: len(own_server.requests()) >= before + 40, WAIT_S, "the requests are in the log")
    made = own_server.requests()[before:]
    assert sorted({request.partition(f".{registry._nodes.split('/')[1]}.")[0] for request in made}) == [
        "PUT /v1/agent/check/pass/service:cluster-tasks",
        "PUT /v1/txn",
    ]
    assert len(made) == 40
    with Watcher(registry) as watcher:
        watcher.wait_for("joined a/1")
        before = len(own_server.requests())
        for _ in range(200):
            registry.beat("a", LOADED, NodeStatus.ONLINE)
        asked = [request for request in own_server.requests()[before:] if "/head?" in request]
    # One query lasts nearly a second, whatever beats come meanwhile.
    assert len(asked) < 100


def test_a_watch_of_no_nodes_does_not_wake_with_every_write_of_others(
    own_server: ConsulServer, open_consul: Open
) -> None:
    with Watcher(open_consul(own_server.url())):
        wait_until(lambda: any("/head?index" in each for each in own_server.requests()), WAIT_S, "the watch waits")
        before, began_s = len(own_server.requests()), time.monotonic()
        for number in range(300):
            own_server.api("PUT", "/v1/kv/other", number)
        took_s = time.monotonic() - began_s
        asked = [request for request in own_server.requests()[before:] if "/head?" in request]
    # At most one after each pause, however fast others write.
    assert len(asked) <= took_s / PAUSE_S + 2


def test_old_events_go_and_a_watch_that_was_outrun_tells_the_difference(
    consul_server: ConsulServer, open_consul: Open
) -> None:
    registry = open_consul(consul_server.url(), events_kept=4)
    events = watch_from_now(registry)
    registry.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    come_and_go(registry, "guest", "1234567")
    registry.deregister("a", "1")
    registry.register(node("b"))
    keys = consul_server.api("GET", f"/v1/kv/{registry._events}?keys")
    assert len(keys) == 4
    assert take(events, 2) == ["left a/1", "joined b/1"]
    assert rest(registry, events) == []


def test_a_backlog_of_more_events_than_one_transaction_takes_is_told_whole(in_consul: ConsulRegistry) -> None:
    events = watch_from_now(in_consul)
    expected = come_and_go(in_consul, "guest", map(str, range(100)))
    assert rest(in_consul, events) == expected


# Names and records


def test_services_and_clusters_of_one_consul_do_not_see_each_other(
    consul_server: ConsulServer, open_consul: Open
) -> None:
    first, second = Keys(f"a{uuid.uuid4().hex[:8]}"), Keys(f"b{uuid.uuid4().hex[:8]}")
    places = [(first, "cluster-tasks"), (first, "other"), (second, "cluster-tasks")]
    registries = [open_consul(consul_server.url(service=service), keys=keys) for keys, service in places]
    for number, registry in enumerate(registries):
        registry.register(node("shared", str(number)))
    assert [[each.epoch for each in registry.list()] for registry in registries] == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize("node_id", [".", "..", "a.b", "-", "..x", "@", "x" * 128])
def test_every_id_of_a_node_can_be_kept(in_consul: ConsulRegistry, node_id: str) -> None:
    in_consul.register(node(node_id))
    in_consul.set_status(node_id, NodeStatus.BUSY)
    assert in_consul.get(node_id) == in_consul.list()[0]
    in_consul.deregister(node_id, "1")
    assert list(in_consul.list()) == []


def test_an_unreadable_record_hides_no_other_node_and_is_warned_of_once(
    consul_server: ConsulServer, in_consul: ConsulRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    events = watch_from_now(in_consul)
    consul_server.api("PUT", f"/v1/kv/{in_consul._nodes}new", {"id": "new", "roles": ["of a newer release"]})
    consul_server.api("PUT", f"/v1/kv/{in_consul._nodes}text", "no record")
    for _ in range(2):
        assert [each.id for each in in_consul.list()] == ["first"]
    with pytest.raises(NodeNotFound):
        in_consul.set_status("new", NodeStatus.DRAINING)
    assert rest(in_consul, events) == []
    assert sorted(vars(record)["node"].rpartition("/")[2] for record in caplog.records) == ["new", "text"]


def test_a_head_that_something_else_has_written_is_named(
    consul_server: ConsulServer, in_consul: ConsulRegistry
) -> None:
    consul_server.api("PUT", f"/v1/kv/{in_consul._head}", "mine")
    for call in (lambda: in_consul.register(RICH), lambda: in_consul.list()):
        with pytest.raises(RegistryUnavailable, match="head of Consul holds something else; remove it"):
            call()


def test_a_status_set_by_an_older_release_keeps_what_a_newer_one_wrote(
    consul_server: ConsulServer, in_consul: ConsulRegistry
) -> None:
    consul_server.api("PUT", f"/v1/kv/{in_consul._nodes}new", {"id": "new", "epoch": "1", "colour": "blue"})
    in_consul.set_status("new", NodeStatus.DRAINING)
    record = consul_server.api("GET", f"/v1/kv/{in_consul._nodes}new?raw")
    assert (record["colour"], record["status"]) == ("blue", "draining")


# The way to it


def test_a_registry_that_is_closed_leaves_its_watches_alone(
    in_consul: ConsulRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    in_consul.register(node("first"))
    with Watcher(in_consul) as watcher:
        watcher.wait_for("joined first/1")
        in_consul.close()
        in_consul.register(node("last"))
        watcher.wait_for("joined last/1")
    assert caplog.records == []


def test_the_url_and_not_the_environment_says_where_consul_is(
    consul_server: ConsulServer, open_consul: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("CONSUL_HTTP_SSL", "true")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    registry = open_consul(consul_server.url())
    registry.register(RICH)
    assert list(registry.list()) == [RICH]


def test_a_datacenter_is_asked_by_its_name(consul_server: ConsulServer, open_consul: Open) -> None:
    registry = open_consul(consul_server.url(datacenter="dc1"))
    registry.register(RICH)
    assert list(open_consul(consul_server.url()).list()) == [RICH]
    for call in calls(open_consul(consul_server.url(datacenter="elsewhere")))[3:]:
        with pytest.raises(RegistryUnavailable, match="No path to datacenter"):
            call()


def test_the_choice_by_scheme_reaches_a_consul(consul_server: ConsulServer) -> None:
    url = consul_server.url(service="chosen")
    chosen = create_registry(url, broker_url="redis://127.0.0.1:6379/0", keys=KEYS, clock=SystemClock())
    assert isinstance(chosen, ConsulRegistry)
    with closing(chosen):
        chosen.register(RICH)
        assert list(chosen.list()) == [RICH]


def test_tls_is_spoken_and_the_certificate_is_checked(tmp_path: Path, open_consul: Open) -> None:
    (certificate, key), port = make_certificate(tmp_path), free_port()
    settings = {"ports": {"https": port}, "cert_file": str(certificate), "key_file": str(key)}
    with ConsulServer(tmp_path / "consul", settings=settings) as server:

        def url(**options: str) -> str:
            return server.url(scheme="https", **options).replace(str(server.port), str(port))

        registry = open_consul(url(ca=str(certificate)))
        events = watch_from_now(registry)
        registry.register(RICH)
        assert take(events, 1) == [f"joined {RICH.id}/{RICH.epoch}"]
        assert len(open_consul(url(verify="false")).list()) == 2
        with pytest.raises(RegistryUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            open_consul(url()).list()
    with pytest.raises(ConfigurationError, match=r"ca='/nowhere\.pem'.*PEM"):
        open_consul(url(ca="/nowhere.pem"))
    assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
