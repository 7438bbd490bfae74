"""What every registry promises, and what the one in Redis promises besides."""

from __future__ import annotations

import faulthandler
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Semaphore, Thread
from types import TracebackType
from typing import Any, Self

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.clock import ManualClock, SystemClock
from cluster_tasks.errors import ConfigurationError, NodeNotFound, RegistryUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.model import Capacity, EventType, Load, Node, NodeEvent, NodeFilter, NodeRole, NodeStatus
from cluster_tasks.redis_store import connect, text
from cluster_tasks.registry import MemoryRegistry, RedisRegistry, Registry, create_registry
from tests.waiting import wait_until
from workers.redis_server import RedisServer

OpenRegistry = Callable[[], Registry]

KEYS = Keys("contract")
WAIT_S = 20.0
ENDED_S = 60.0
"""Where coverage is measured, it is written at the end of a process, after a walk through the source tree."""
LOADED = Load(current_connections=3, current_qps=1.5, memory_usage_mb=900.25, cpu_usage_percent=71.0, queue_length=4)
RICH = Node(
    id="gpu1@host-a",
    name="GPU 1, größte",
    address="10.0.0.7",
    port=9100,
    status=NodeStatus.BUSY,
    roles=frozenset({NodeRole.WORKER, NodeRole.CACHE}),
    capacity=Capacity(max_connections=8, max_qps=2.5, max_memory_mb=16_000, max_threads=4),
    load=LOADED,
    metadata={"zone": "a", "note": 'line one\nline "two" {}', "empty": ""},
    serves=frozenset({"llm", "embedding"}),
    epoch="17-x9",
    registered_at=1_699_999_990.125,
    last_seen=1_699_999_999.5,
)


def node(node_id: str, epoch: str = "1", **fields: Any) -> Node:
    return Node(id=node_id, epoch=epoch, **fields)


def calls(registry: Registry) -> list[Callable[[], object]]:
    """Every call of a registry that an outage ends."""
    return [
        lambda: registry.register(RICH),
        lambda: registry.beat(RICH.id, LOADED, NodeStatus.ONLINE),
        lambda: registry.deregister(RICH.id, RICH.epoch),
        lambda: registry.get(RICH.id),
        lambda: registry.list(),
        lambda: registry.set_status(RICH.id, NodeStatus.ONLINE),
    ]


def said(event: NodeEvent) -> str:
    return f"{event.type} {event.node.id}/{event.node.epoch}"


def take(events: Iterator[NodeEvent], count: int) -> list[str]:
    return [said(event) for event in islice(events, count)]


def until_joined(node_id: str, events: Iterable[NodeEvent]) -> Iterator[NodeEvent]:
    for event in events:
        yield event
        if event.type is EventType.JOINED and event.node.id == node_id:
            return


def rest(registry: Registry, events: Iterator[NodeEvent]) -> list[str]:
    """What is still to be told: a last node marks the end."""
    registry.register(node("last"))
    return [said(event) for event in until_joined("last", events)][:-1]


def watch_from_now(registry: Registry) -> Iterator[NodeEvent]:
    """A watch that has begun, of a registry that knows one node: it need not look before it is asked."""
    registry.register(node("first"))
    events = registry.watch(Event())
    assert take(events, 1) == ["joined first/1"]
    return events


def replay(events: Iterable[NodeEvent]) -> dict[str, str]:
    """The epochs of the nodes that a watcher believes in. Fails if the events contradict each other."""
    known: dict[str, str] = {}
    for event in events:
        if event.type is EventType.JOINED:
            assert event.node.id not in known, said(event)
            known[event.node.id] = event.node.epoch
        else:
            assert known.get(event.node.id) == event.node.epoch, said(event)
        if event.type is EventType.LEFT:
            del known[event.node.id]
    return known


class CountedEvent(Event):
    """An event that knows how often it was waited for."""

    waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return super().wait(timeout)


class Watcher:
    """A watch in a thread of its own, ended by its ``stop``."""

    def __init__(self, registry: Registry) -> None:
        self.events: list[NodeEvent] = []
        self.stop = CountedEvent()
        self._thread = Thread(target=self._follow, args=(registry,), daemon=True)

    def _follow(self, registry: Registry) -> None:
        # A list takes what extend has read so far, one by one: others can look at it meanwhile.
        self.events.extend(registry.watch(self.stop))

    @property
    def told(self) -> list[str]:
        return [said(event) for event in self.events]

    def wait_for(self, told: str) -> None:
        wait_until(lambda: told in self.told, WAIT_S, f"{told!r} is told")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the watch did not end"


# Records


def test_a_node_is_read_back_as_it_was_registered(open_registry: OpenRegistry) -> None:
    open_registry().register(RICH)
    assert open_registry().get(RICH.id) == RICH


def test_nodes_are_listed_by_id(registry: Registry) -> None:
    assert list(registry.list()) == []
    nodes = [node(node_id) for node_id in ("b", "a10", "C", "a9", "a@h")]
    for each in nodes:
        registry.register(each)
    assert list(registry.list()) == sorted(nodes, key=lambda each: each.id)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (NodeFilter(), "abc"),
        (NodeFilter(status=NodeStatus.DRAINING), "b"),
        (NodeFilter(role=NodeRole.CACHE), "ac"),
        (NodeFilter(request_type="llm"), "ab"),
        (NodeFilter(metadata={"zone": "x"}), "ab"),
        (NodeFilter(metadata={"zone": "x", "rack": "2"}), "b"),
        (NodeFilter(role=NodeRole.CACHE, request_type="llm"), "a"),
        (NodeFilter(status=NodeStatus.OFFLINE), ""),
    ],
)
def test_a_filter_chooses_nodes(registry: Registry, where: NodeFilter, expected: str) -> None:
    llm = frozenset({"llm"})
    both = frozenset({NodeRole.WORKER, NodeRole.CACHE})
    registry.register(node("a", serves=llm, roles=both, metadata={"zone": "x", "rack": "1"}))
    registry.register(node("b", serves=llm, metadata={"zone": "x", "rack": "2"}, status=NodeStatus.DRAINING))
    registry.register(node("c", roles=frozenset({NodeRole.CACHE})))
    assert "".join(each.id for each in registry.list(where)) == expected


def test_a_list_decodes_what_is_new_and_nothing_else(registry: Registry) -> None:
    # Producers read the nodes more often than nodes beat, in a thread beside the one that places jobs.
    for node_id in "ab":
        registry.register(node(node_id))
    same, old = registry.list()
    registry.beat("b", LOADED, NodeStatus.BUSY)
    first, second = registry.list()
    assert first is same
    assert (old.load, second.load) == (Load(), LOADED)
    registry.register(node("a", "2"))
    assert [each.epoch for each in registry.list()] == ["2", "1"]


def test_a_beat_renews_load_status_and_time_and_nothing_else(registry: Registry, clock: ManualClock) -> None:
    registry.register(RICH)
    clock.advance(7.25)
    registry.beat(RICH.id, Load(queue_length=9), NodeStatus.ONLINE)
    renewed = {"load": Load(queue_length=9), "status": NodeStatus.ONLINE, "last_seen": clock.time()}
    assert registry.get(RICH.id) == RICH.model_copy(update=renewed)


def test_a_status_is_set_without_touching_load_or_time(registry: Registry, clock: ManualClock) -> None:
    registry.register(RICH)
    clock.advance(7.25)
    registry.set_status(RICH.id, NodeStatus.DRAINING)
    assert registry.get(RICH.id) == RICH.model_copy(update={"status": NodeStatus.DRAINING})


@pytest.mark.parametrize(
    "call",
    [
        lambda registry: registry.get("gpu2@a"),
        lambda registry: registry.beat("gpu2@a", LOADED, NodeStatus.ONLINE),
        lambda registry: registry.set_status("gpu2@a", NodeStatus.ONLINE),
    ],
    ids=["get", "beat", "set_status"],
)
def test_an_unknown_node_is_an_error_that_names_the_nearest(
    registry: Registry, call: Callable[[Registry], object]
) -> None:
    with pytest.raises(NodeNotFound, match=r"no node 'gpu2@a' is registered$"):
        call(registry)
    registry.register(node("gpu1@a"))
    registry.register(node("elsewhere"))
    with pytest.raises(NodeNotFound, match="did you mean 'gpu1@a'"):
        call(registry)
    assert [each.id for each in registry.list()] == ["elsewhere", "gpu1@a"]


def test_only_the_epoch_that_is_registered_is_deregistered(registry: Registry) -> None:
    registry.register(node("a", "2"))
    registry.deregister("a", "1")
    registry.deregister("never seen", "1")
    assert registry.get("a").epoch == "2"
    registry.deregister("a", "2")
    registry.deregister("a", "2")
    assert list(registry.list()) == []


def test_a_record_replaces_the_one_before_it(registry: Registry) -> None:
    registry.register(RICH)
    restarted = node(RICH.id, "18-y2", metadata={"zone": "b"})
    registry.register(restarted)
    assert list(registry.list()) == [restarted]


def test_an_erased_registry_knows_no_node_and_tells_so(open_registry: OpenRegistry) -> None:
    events, registry = watch_from_now(open_registry()), open_registry()
    registry.register(RICH)
    assert take(events, 1) == [f"joined {RICH.id}/{RICH.epoch}"]
    registry.erase()
    assert list(registry.list()) == []
    assert sorted(take(events, 2)) == ["left first/1", f"left {RICH.id}/{RICH.epoch}"]
    with pytest.raises(NodeNotFound):
        registry.beat(RICH.id, LOADED, NodeStatus.ONLINE)
    registry.register(RICH)
    assert list(registry.list()) == [RICH]
    registry.erase()
    registry.erase()


def test_a_registry_is_closed_before_use_and_twice(open_registry: OpenRegistry) -> None:
    registry = open_registry()
    registry.close()
    registry.register(RICH)
    registry.close()
    registry.close()


# Watching


def test_a_watch_first_tells_the_nodes_that_exist(registry: Registry) -> None:
    registry.register(node("b"))
    registry.register(RICH)
    registry.register(node("a"))
    registry.deregister("a", "1")
    registry.beat(RICH.id, Load(), NodeStatus.ONLINE)
    events = [*until_joined(RICH.id, registry.watch(Event()))]
    assert [said(event) for event in events] == ["joined b/1", f"joined {RICH.id}/{RICH.epoch}"]
    assert events[-1].node == registry.get(RICH.id)


def test_a_watch_tells_what_comes_changes_and_goes(open_registry: OpenRegistry, clock: ManualClock) -> None:
    events, other = watch_from_now(open_registry()), open_registry()
    clock.advance(5)
    other.register(RICH)
    joined = next(events)
    assert (joined.type, joined.node, joined.timestamp) == (EventType.JOINED, RICH, clock.time())
    other.beat(RICH.id, Load(queue_length=1), NodeStatus.ONLINE)
    updated = next(events)
    assert (updated.type, updated.node) == (EventType.UPDATED, other.get(RICH.id))
    other.set_status(RICH.id, NodeStatus.DRAINING)
    assert next(events).node == other.get(RICH.id)
    other.beat(RICH.id, Load(queue_length=2), NodeStatus.DRAINING)
    gone = other.get(RICH.id)
    other.deregister(RICH.id, RICH.epoch)
    left = next(events)
    assert (left.type, left.node) == (EventType.LEFT, gone)


def test_a_node_that_came_and_went_between_two_reads_is_told(registry: Registry) -> None:
    events = watch_from_now(registry)
    registry.register(node("guest"))
    registry.deregister("guest", "1")
    registry.register(node("guest", "2"))
    registry.deregister("guest", "2")
    assert rest(registry, events) == ["joined guest/1", "left guest/1", "joined guest/2", "left guest/2"]


def test_the_very_first_node_is_told_though_it_came_and_went(registry: Registry) -> None:
    with Watcher(registry) as watcher:
        for epoch in map(str, range(20)):
            registry.register(node("guest", epoch))
            registry.deregister("guest", epoch)
        registry.register(node("last"))
        watcher.wait_for("joined last/1")
    # When the watch began is open; from then on it is complete.
    whole = [f"{what} guest/{epoch}" for epoch in range(20) for what in ("joined", "left")] + ["joined last/1"]
    assert watcher.told == whole[-len(watcher.told) :]


def test_what_changes_nothing_is_not_told(registry: Registry) -> None:
    events = watch_from_now(registry)
    registry.register(RICH)
    registry.register(RICH)
    registry.register(RICH.model_copy(update={"load": Load(), "last_seen": 1.0}))
    registry.beat(RICH.id, LOADED, RICH.status)
    registry.set_status(RICH.id, RICH.status)
    registry.deregister(RICH.id, "another epoch")
    assert rest(registry, events) == [f"joined {RICH.id}/{RICH.epoch}"]


@pytest.mark.parametrize("change", [{"status": NodeStatus.OFFLINE}, {"metadata": {"zone": "b"}}, {"port": 1}], ids=str)
def test_a_changed_record_of_the_same_epoch_is_an_update(registry: Registry, change: dict[str, Any]) -> None:
    events = watch_from_now(registry)
    registry.register(RICH)
    changed = RICH.model_copy(update=change)
    registry.register(changed)
    told = [*islice(events, 2)]
    assert [event.type for event in told] == [EventType.JOINED, EventType.UPDATED]
    assert told[-1].node == changed


def test_a_new_epoch_ends_the_old_node_and_begins_a_new_one(registry: Registry) -> None:
    events = watch_from_now(registry)
    registry.register(node("a", "1", port=1))
    registry.beat("a", LOADED, NodeStatus.ONLINE)
    old = registry.get("a")
    registry.register(node("a", "2", port=2))
    _, left, joined = islice(events, 3)
    assert (left.type, left.node) == (EventType.LEFT, old)
    assert (joined.type, joined.node) == (EventType.JOINED, registry.get("a"))


def test_a_watch_ends_when_it_is_told_to_stop(registry: Registry) -> None:
    registry.register(node("a"))
    with Watcher(registry) as watcher:
        watcher.wait_for("joined a/1")
    stopped = Event()
    stopped.set()
    assert list(registry.watch(stopped)) == []


def test_a_watch_that_began_late_agrees_with_an_early_one(open_registry: OpenRegistry) -> None:
    early, registry = watch_from_now(open_registry()), open_registry()
    registry.register(node("a"))
    late = registry.watch(Event())
    assert take(late, 2) == ["joined a/1", "joined first/1"]
    registry.deregister("a", "1")
    registry.set_status("first", NodeStatus.DRAINING)
    registry.register(node("last"))
    assert take(early, 4) == ["joined a/1", "left a/1", "updated first/1", "joined last/1"]
    assert take(late, 3) == ["left a/1", "updated first/1", "joined last/1"]


# Together


def come_and_go(registry: Registry, node_id: str, epochs: Iterable[str]) -> list[str]:
    """Register and deregister the node with each epoch; return what watchers must be told."""
    expected = []
    for epoch in epochs:
        registry.register(node(node_id, epoch))
        registry.deregister(node_id, epoch)
        expected += [f"joined {node_id}/{epoch}", f"left {node_id}/{epoch}"]
    return expected


def test_no_event_is_lost_or_told_twice_while_threads_change_nodes(open_registry: OpenRegistry) -> None:
    registry = open_registry()
    registry.register(node("first"))
    ids = [f"n{number}" for number in range(6)]
    with ExitStack() as stack:
        watchers = [stack.enter_context(Watcher(open_registry())) for _ in range(2)]
        for watcher in watchers:
            watcher.wait_for("joined first/1")
        with ThreadPoolExecutor(len(ids)) as pool:
            histories = pool.map(lambda node_id: come_and_go(registry, node_id, map(str, range(40))), ids)
            expected = dict(zip(ids, histories, strict=True))
        registry.register(node("last"))
        for watcher in watchers:
            watcher.wait_for("joined last/1")
    told: defaultdict[str, list[str]] = defaultdict(list)
    for event in watchers[0].events:
        told[event.node.id].append(said(event))
    assert told == {**expected, "first": ["joined first/1"], "last": ["joined last/1"]}
    assert watchers[1].events == watchers[0].events


def test_threads_that_fight_for_one_name_leave_a_history_without_contradiction(open_registry: OpenRegistry) -> None:
    registry = open_registry()
    events = watch_from_now(open_registry())
    epochs = [[f"{thread}-{number}" for number in range(40)] for thread in range(4)]
    with ThreadPoolExecutor(len(epochs)) as pool:
        expected = [*pool.map(lambda mine: come_and_go(registry, "shared", mine), epochs)]
    registry.register(node("last"))
    # Nobody renews the first one: where this takes long, it is gone before the end.
    told = [event for event in until_joined("last", events) if event.node.id != "first"]
    assert replay(told) == {each.id: each.epoch for each in registry.list() if each.id != "first"}
    # Each epoch came once and went once, by its own hand or replaced by the next.
    assert sorted(map(said, told[:-1])) == sorted(chain.from_iterable(expected))


def test_a_watch_that_begins_in_the_midst_of_changes_is_free_of_contradiction(open_registry: OpenRegistry) -> None:
    registry, watched, done = open_registry(), open_registry(), Event()

    def change() -> None:
        while not done.is_set():
            come_and_go(registry, "guest", "12")

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        try:
            for _ in range(100):
                replay(islice(watched.watch(Event()), 10))
        finally:
            done.set()
        changing.result()


IDS = st.sampled_from(["a", "b"])
EPOCHS = st.sampled_from(["1", "2"])
STATUSES = st.sampled_from([NodeStatus.ONLINE, NodeStatus.BUSY])
CHANGES = st.tuples(st.sampled_from(["register", "deregister", "set_status", "beat"]), IDS, EPOCHS, STATUSES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([("register", "a", "1", NodeStatus.ONLINE), ("register", "a", "2", NodeStatus.BUSY)])
@given(st.lists(CHANGES, max_size=15))
def test_any_sequence_of_changes_is_told_as_it_happened(
    registry: Registry, changes: list[tuple[str, str, str, NodeStatus]]
) -> None:
    for each in registry.list():
        registry.deregister(each.id, each.epoch)
    events = watch_from_now(registry)
    known: dict[str, tuple[str, NodeStatus]] = {}
    expected: list[str] = []
    for what, node_id, epoch, status in changes:
        before = known.get(node_id)
        if what == "register":
            registry.register(node(node_id, epoch, status=status))
            known[node_id] = (epoch, status)
        elif what == "deregister":
            registry.deregister(node_id, epoch)
            if before and before[0] == epoch:
                del known[node_id]
        elif before:
            if what == "beat":
                registry.beat(node_id, LOADED, status)
            else:
                registry.set_status(node_id, status)
            known[node_id] = (before[0], status)
        after = known.get(node_id)
        if before and after and before[0] == after[0]:
            expected += [f"updated {node_id}/{after[0]}"] if before != after else []
        else:
            expected += [f"left {node_id}/{before[0]}"] if before else []
            expected += [f"joined {node_id}/{after[0]}"] if after else []
    assert {each.id: (each.epoch, each.status) for each in registry.list() if each.id != "first"} == known
    assert rest(registry, events) == expected


MIDST = 10
"""Calls after which a thread is in the midst of them."""


def live(registry: Registry, node_id: str) -> None:
    """The life of a node, in a process of its own, that says where it hangs."""
    faulthandler.dump_traceback_later(WAIT_S)
    registry.register(node(node_id))
    for queue_length in range(50):
        registry.beat(node_id, Load(queue_length=queue_length), NodeStatus.ONLINE)
        assert registry.get(node_id).load.queue_length == queue_length
        assert {node_id, "parent"} <= {each.id for each in registry.list()}
    assert any(event.node.id == node_id for event in registry.watch(Event()))
    registry.close()
    faulthandler.cancel_dump_traceback_later()


def live_in_forks(registry: Registry, count: int = 4) -> None:
    """Have processes forked from this one live as nodes, and see that each ends well."""
    children = [get_context("fork").Process(target=live, args=(registry, f"child{number}")) for number in range(count)]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(ENDED_S)
        assert [child.exitcode for child in children] == [0] * count
    finally:
        for child in children:
            child.kill()
            child.join()


# Python 3.12 warns of what is tested here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_in_the_midst_of_calls_leaves_both_processes_a_registry(registry: Registry) -> None:
    registry.register(node("parent"))
    done = Event()

    def beat_all_the_time(beaten: Semaphore) -> int:
        beats = 0
        while not done.is_set():
            registry.beat("parent", LOADED, NodeStatus.ONLINE)
            beats += 1
            beaten.release()
        return beats

    with ThreadPoolExecutor(2) as pool:
        beaten = [Semaphore(0), Semaphore(0)]
        beating = [pool.submit(beat_all_the_time, each) for each in beaten]
        try:
            # Coverage locks what a thread runs for the first time, and has no hook for forks.
            assert all(each.acquire(timeout=WAIT_S) for each in beaten for _ in range(MIDST))
            live_in_forks(registry)
        finally:
            done.set()
    assert all(future.result() for future in beating)
    if isinstance(registry, RedisRegistry):
        assert len(registry.list()) == 5


# In Redis


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with connect(redis_server.url) as client:
        yield client


@pytest.fixture
def in_redis(redis_server: RedisServer) -> Iterator[RedisRegistry]:
    with closing(RedisRegistry(redis_server.url, KEYS, SystemClock())) as registry:
        yield registry


@pytest.fixture
def durable_server(redis_binary: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that remembers its data over a restart."""
    with RedisServer(tmp_path, appendonly=True) as server:
        yield server


def test_every_call_during_an_outage_raises_registry_unavailable(
    redis_server: RedisServer, in_redis: RedisRegistry
) -> None:
    in_redis.register(RICH)
    redis_server.stop()
    for call in calls(in_redis):
        with pytest.raises(RegistryUnavailable):
            call()


def test_a_watch_goes_on_where_it_was_after_an_outage_and_warns_once_of_each(
    durable_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "cluster_tasks.registry")
    with closing(RedisRegistry(durable_server.url, KEYS, SystemClock())) as registry:
        registry.register(node("first"))
        with Watcher(registry) as watcher:
            watcher.wait_for("joined first/1")
            for outage in ("1", "2"):
                durable_server.stop()
                watcher.stop.waits = 0
                wait_until(lambda: watcher.stop.waits >= 3, WAIT_S, "the watch tries again")
                durable_server.start()
                registry.register(node("guest", outage))
                registry.deregister("guest", outage)
                watcher.wait_for(f"left guest/{outage}")
    assert watcher.told == ["joined first/1", *(f"{what} guest/{n}" for n in "12" for what in ("joined", "left"))]
    assert [record.message for record in caplog.records] == ["registry lost, the watch goes on when it answers"] * 2


def test_a_watch_of_a_redis_that_came_back_empty_tells_the_difference(
    redis_server: RedisServer, in_redis: RedisRegistry
) -> None:
    events = watch_from_now(in_redis)
    for each in (node("a"), node("b"), node("c"), RICH):
        in_redis.register(each)
    assert len(take(events, 4)) == 4
    redis_server.stop()
    redis_server.start()
    with pytest.raises(NodeNotFound):
        in_redis.beat("a", LOADED, NodeStatus.ONLINE)
    for each in (node("a"), node("b", "2"), RICH.model_copy(update={"port": 1})):
        in_redis.register(each)
    expected = ["left b/1", "joined b/2", "left c/1", "left first/1", f"updated {RICH.id}/{RICH.epoch}"]
    assert take(events, 5) == expected
    in_redis.deregister("a", "1")
    assert rest(in_redis, events) == ["left a/1"]


def test_a_watch_notices_without_an_event_that_redis_was_emptied(client: redis.Redis, in_redis: RedisRegistry) -> None:
    events = watch_from_now(in_redis)
    client.flushdb()
    assert take(events, 1) == ["left first/1"]
    assert rest(in_redis, events) == []


def test_a_watch_of_an_empty_redis_misses_no_first_node(client: redis.Redis, in_redis: RedisRegistry) -> None:
    with Watcher(in_redis) as watcher:
        wait_until(lambda: client.info("clients")["blocked_clients"], WAIT_S, "the watch waits for events")
        expected = come_and_go(in_redis, "guest", "1")
        in_redis.register(node("last"))
        watcher.wait_for("joined last/1")
    assert watcher.told == [*expected, "joined last/1"]


def test_a_watch_that_the_stream_has_outrun_tells_the_difference(client: redis.Redis, in_redis: RedisRegistry) -> None:
    events = watch_from_now(in_redis)
    in_redis.register(node("a"))
    assert take(events, 1) == ["joined a/1"]
    come_and_go(in_redis, "guest", "12")
    in_redis.deregister("a", "1")
    in_redis.register(node("b"))
    client.xtrim(KEYS.node_events, maxlen=2, approximate=False)
    assert take(events, 2) == ["left a/1", "joined b/1"]
    assert rest(in_redis, events) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda registry, node_id: registry.register(node(node_id, "2")),
        lambda registry, node_id: registry.deregister(node_id, "1"),
        lambda registry, node_id: registry.set_status(node_id, NodeStatus.DRAINING),
        lambda registry, node_id: registry.beat(node_id, LOADED, NodeStatus.BUSY),
    ],
    ids=["register", "deregister", "set_status", "beat"],
)
def test_every_change_keeps_the_stream_short(
    client: redis.Redis, in_redis: RedisRegistry, change: Callable[[Registry, str], None]
) -> None:
    ids = [f"n{number}" for number in range(250)]
    for node_id in ids:
        in_redis.register(node(node_id))
    capped = RedisRegistry(client, KEYS, SystemClock(), events_kept=100)
    for node_id in ids:
        change(capped, node_id)
    # Redis trims whole blocks, of 100 entries by default.
    assert 100 <= client.xlen(KEYS.node_events) <= 200


def test_a_backlog_of_more_events_than_one_read_takes_is_told_whole(in_redis: RedisRegistry) -> None:
    events = watch_from_now(in_redis)
    expected = come_and_go(in_redis, "guest", map(str, range(600)))
    assert rest(in_redis, events) == expected


def test_two_clusters_in_one_redis_do_not_see_each_other(redis_server: RedisServer, in_redis: RedisRegistry) -> None:
    with closing(RedisRegistry(redis_server.url, Keys("other"), SystemClock())) as other:
        ours, theirs = watch_from_now(in_redis), watch_from_now(other)
        in_redis.register(node("a"))
        other.register(node("b"))
        assert [each.id for each in in_redis.list()] == ["a", "first"]
        with pytest.raises(NodeNotFound):
            other.get("a")
        assert rest(in_redis, ours) == ["joined a/1"]
        assert rest(other, theirs) == ["joined b/1"]


def test_a_node_whose_load_was_evicted_must_register_again(client: redis.Redis, in_redis: RedisRegistry) -> None:
    in_redis.register(RICH)
    client.delete(KEYS.loads)
    assert list(in_redis.list()) == []
    with pytest.raises(NodeNotFound):
        in_redis.beat(RICH.id, LOADED, NodeStatus.ONLINE)
    in_redis.register(RICH)
    assert list(in_redis.list()) == [RICH]


def test_an_unreadable_record_hides_no_other_node_and_is_warned_of_once(
    client: redis.Redis, in_redis: RedisRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    in_redis.register(node("new"))
    record = text(client.hget(KEYS.nodes, "new") or "")
    client.hset(KEYS.nodes, "new", record.replace('"worker"', '"role of a newer release"'))
    events = watch_from_now(in_redis)
    in_redis.set_status("new", NodeStatus.DRAINING)
    assert [each.id for each in in_redis.list()] == ["first"]
    assert rest(in_redis, events) == []
    assert [vars(record)["node"] for record in caplog.records] == ["new"]


def test_a_client_that_decodes_replies_will_do(redis_server: RedisServer) -> None:
    with connect(redis_server.url, decode_responses=True) as client:
        registry = RedisRegistry(client, KEYS, SystemClock())
        events = watch_from_now(registry)
        registry.register(RICH)
        assert registry.get(RICH.id) == RICH
        assert next(events).node == RICH


def test_a_registry_that_is_closed_leaves_its_watches_alone(
    in_redis: RedisRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    in_redis.register(node("first"))
    with Watcher(in_redis) as watcher:
        watcher.wait_for("joined first/1")
        in_redis.close()
        in_redis.register(node("last"))
        watcher.wait_for("joined last/1")
    assert caplog.records == []


# The choice


def chosen(url: SecretUrl | str | None, **options: Any) -> Registry:
    broker_url = SecretUrl("redis://127.0.0.1:6379/0")
    return create_registry(url, broker_url=broker_url, **{"keys": KEYS, "clock": SystemClock(), **options})


@pytest.mark.parametrize(
    "url",
    [None, "redis://h/1", "rediss://h:1/0", "redis+socket:///run/redis.sock", SecretUrl("sentinel://h;sentinel://i")],
)
def test_redis_keeps_the_registry_by_default_and_by_any_of_its_schemes(url: SecretUrl | str | None) -> None:
    with closing(chosen(url)) as registry:
        assert isinstance(registry, RedisRegistry)


def test_memory_is_one_registry_for_each_cluster_name_of_the_process() -> None:
    registry = chosen("memory://", keys=Keys("one"))
    assert isinstance(registry, MemoryRegistry)
    assert chosen(SecretUrl("memory://"), keys=Keys("one")) is registry
    assert chosen("memory://", keys=Keys("two")) is not registry


def test_an_unknown_scheme_is_refused_with_the_nearest_and_without_the_password() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'redis'") as error:
        chosen("reddis://:secret@host/0")
    assert "secret" not in str(error.value)
