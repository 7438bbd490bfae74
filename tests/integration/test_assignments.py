"""Who is to hold which shards, and who is ready: the scripts, the plans and the keepers on a real Redis."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.clock import ManualClock, SystemClock
from cluster_tasks.errors import InvalidArguments, NodeNotFound, ShardNotFound, StoreUnavailable
from cluster_tasks.failover.events import ClusterEvent, EventLog
from cluster_tasks.model import Capacity, Node, NodeRole, NodeStatus
from cluster_tasks.shards.assignments import Assigned, AssignmentTable, Division
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.keeper import LOOK_EVERY_S, TELL_EVERY_S, ShardKeeper, tell_collections
from cluster_tasks.shards.manager import ShardManager
from cluster_tasks.shards.placement import Shard
from cluster_tasks.shards.shard_map import ShardMap, Shares
from cluster_tasks.shards.store import CollectionStore
from tests.broker import Broker
from workers.redis_server import RedisServer

HOLDER = frozenset({NodeRole.WORKER, NodeRole.CACHE})
GENERATION = 1


class Site:
    """A cluster of nodes of which only the records and the epochs exist."""

    def __init__(self, broker: Broker) -> None:
        self.broker, self.clock = broker, ManualClock()
        self.table = AssignmentTable(broker.client, broker.keys)
        self.nodes: dict[str, Node] = {}
        self.events = EventLog(broker.client, broker.keys, SystemClock())

    def join(self, *node_ids: str, zone: str = "", roles: frozenset[NodeRole] = HOLDER) -> None:
        """Let nodes join, or come back."""
        for node_id in node_ids:
            epoch = self.broker.open(node_id, "retrieval")
            self.nodes[node_id] = Node(
                id=node_id, roles=roles, serves=frozenset({"retrieval"}), metadata={"zone": zone}, epoch=epoch,
                capacity=Capacity(max_connections=2),
            )  # fmt: skip

    def lose(self, node_id: str) -> None:
        """Fence a node, as a health check does; the registry forgets it later."""
        assert self.broker.epochs.fence(node_id, Beat(self.epoch(node_id), 0))

    def epoch(self, node_id: str) -> str:
        return self.broker.epochs.beats()[node_id].epoch

    def manager(self, replicas: int = 2) -> ShardManager:
        return ShardManager(
            self.table, self.broker.epochs, lambda: list(self.nodes.values()), self.events.entry, replicas
        )

    def held(self, collection: str = "docs") -> list[set[str]]:
        return [set(nodes) for nodes in self.table.read().collections[collection].nodes]

    def ready(self, collection: str = "docs") -> list[set[str]]:
        found = self.table.whereabouts(collection)
        return [set(nodes) for nodes in found.ready] if found else []

    def told(self, kind: str) -> list[ClusterEvent]:
        return [event for event in self.events.latest(100) if event.kind == kind]


@pytest.fixture
def site(broker: Broker) -> Site:
    return Site(broker)


# The scripts.


def test_of_two_plans_for_one_version_the_first_is_written(site: Site) -> None:
    table, assigned = site.table, Assigned(GENERATION, (("a", "b"), ()))
    version = table.write("", {"docs": assigned}, site.events.entry("shards assigned", loads={"a": 1}))
    assert version is not None
    assert table.write("", {"docs": Assigned(GENERATION, ((),))}, site.events.entry("shards assigned")) is None
    assert (table.read().version, table.read().collections) == (version, {"docs": assigned})
    assert [event.facts for event in site.told("shards assigned")] == [{"loads": {"a": 1}}]
    assert table.write(version, {"docs": None, "more": assigned}) not in (None, version)
    assert table.read().collections == {"more": assigned}


def test_an_old_generation_of_a_collection_is_no_news(site: Site) -> None:
    table = site.table
    assert table.announce("docs", Division(10, 4))
    assert not table.announce("docs", Division(10, 4))
    assert not table.announce("docs", Division(9, 8))
    assert not table.withdraw("docs", 9)
    assert table.divisions() == {"docs": Division(10, 4)}
    assert table.withdraw("docs", 10)
    assert not table.withdraw("docs", 10)
    assert table.divisions() == {}


def test_a_node_is_ready_under_its_epoch_only(site: Site) -> None:
    site.join("a", "b")
    table = site.table
    assert table.whereabouts("docs") is None
    table.write("", {"docs": Assigned(GENERATION, (("a", "b"), ("b", "a")))})
    shards = [Shard("docs", 0), Shard("docs", 1)]
    assert table.report("a", site.epoch("a"), GENERATION, shards)
    assert table.report("b", site.epoch("b"), GENERATION, shards[:1])
    assert site.ready() == [{"a", "b"}, {"a"}]
    before = site.epoch("a")
    site.lose("a")
    assert site.ready() == [{"b"}, set()]
    assert not table.report("a", before, GENERATION, shards)
    site.join("a")
    assert site.ready() == [{"b"}, set()], "it has to load everything again"


def test_what_was_reported_of_another_generation_is_void(site: Site) -> None:
    site.join("a")
    site.table.report("a", site.epoch("a"), GENERATION, [Shard("docs", 0), Shard("docs", 3)])
    site.table.write("", {"docs": Assigned(GENERATION + 1, (("a",),))})
    assert site.ready() == [set()]
    site.table.report("a", site.epoch("a"), GENERATION + 1, [Shard("docs", 0)])
    assert site.ready() == [{"a"}]
    assert site.table.sweep("docs", site.table.read().collections["docs"]) == 2
    assert site.ready() == [{"a"}]


def test_letting_go_spares_what_a_later_epoch_has_reported(site: Site) -> None:
    site.join("a")
    site.table.write("", {"docs": Assigned(GENERATION, (("a",),))})
    before = site.epoch("a")
    site.lose("a")
    site.join("a")
    site.table.report("a", site.epoch("a"), GENERATION, [Shard("docs", 0)])
    site.table.let_go("a", before, GENERATION, Shard("docs", 0))
    assert site.ready() == [{"a"}]
    site.table.let_go("a", site.epoch("a"), GENERATION, Shard("docs", 0))
    assert site.ready() == [set()]


def test_a_duty_is_done_by_one_in_its_time(site: Site) -> None:
    assert site.table.claim("plan", 60)
    assert not site.table.claim("plan", 60)
    assert site.table.claim("look", 60)


# The plans.


def test_a_new_collection_is_held_by_two_nodes_each_and_told_of_once(site: Site) -> None:
    site.join("a", "b", "c")
    site.table.announce("docs", Division(GENERATION, 6))
    manager = site.manager()
    assert manager.plan()
    assert [len(nodes) for nodes in site.held()] == [2] * 6
    version = site.table.read().version
    assert not manager.plan()
    assert not site.manager().plan(), "another process comes to the same plan"
    assert site.table.read().version == version
    (event,) = site.told("shards assigned")
    assert event.facts["collections"] == ["docs"]
    assert sum(event.facts["loads"].values()) == 12


def test_only_online_nodes_that_hold_and_search_are_given_shards(site: Site) -> None:
    site.join("holder")
    site.join("worker", roles=frozenset({NodeRole.WORKER}))
    site.join("cache-only", roles=frozenset({NodeRole.CACHE}))
    site.join("generator", "drains", "dead")
    site.nodes["generator"] = site.nodes["generator"].model_copy(update={"serves": frozenset({"llm"})})
    site.nodes["drains"] = site.nodes["drains"].model_copy(update={"status": NodeStatus.DRAINING})
    site.lose("dead")
    site.table.announce("docs", Division(GENERATION, 2))
    site.manager().plan()
    assert site.held() == [{"holder"}, {"holder"}]


def test_replicas_lie_in_different_zones(site: Site) -> None:
    site.join("a1", "a2", zone="a")
    site.join("b1", "b2", zone="b")
    site.table.announce("docs", Division(GENERATION, 8))
    site.manager().plan()
    assert all({node_id[0] for node_id in nodes} == {"a", "b"} for nodes in site.held())


def test_after_a_loss_the_replicas_stay_and_only_the_lost_copies_move(site: Site) -> None:
    site.join("a", "b", "c", "d")
    site.table.announce("docs", Division(GENERATION, 16))
    manager = site.manager()
    manager.plan()
    before = site.held()
    site.lose("a")
    del site.nodes["a"]
    assert manager.plan()
    for old, new in zip(before, site.held(), strict=True):
        assert len(new) == 2
        assert "a" not in new
        assert len(old - {"a"} - new) == 0 or "a" not in old
    moved = sum(len(new - old) for old, new in zip(before, site.held(), strict=True))
    assert moved <= sum("a" in old for old in before) + 1


def test_a_registry_that_forgets_nodes_moves_nothing(site: Site) -> None:
    site.join("a", "b", "c")
    site.table.announce("docs", Division(GENERATION, 4))
    manager = site.manager()
    manager.plan()
    version, nodes = site.table.read().version, dict(site.nodes)
    site.nodes.clear()
    assert not manager.plan()
    assert site.table.read().version == version
    site.nodes.update(nodes)
    assert not manager.plan()
    assert site.table.read().version == version


def test_a_collection_that_is_no_more_leaves_nothing(site: Site) -> None:
    site.join("a")
    site.table.announce("docs", Division(GENERATION, 2))
    manager = site.manager()
    manager.plan()
    site.table.report("a", site.epoch("a"), GENERATION, [Shard("docs", 0)])
    site.table.withdraw("docs", GENERATION)
    assert manager.plan()
    assert site.table.read().collections == {}
    assert not site.broker.client.exists(site.broker.keys.shards_ready("docs"))


def test_planners_at_once_agree(site: Site) -> None:
    site.join("a", "b", "c", "d", "e")
    for number in range(4):
        site.table.announce(f"docs-{number}", Division(GENERATION, 4))
    managers = [site.manager() for _ in range(6)]
    threads = [threading.Thread(target=manager.plan) for manager in managers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.told("shards assigned")) == 1
    assert not any(manager.plan() for manager in managers)


def test_a_shard_is_moved_by_hand_and_plans_leave_it_there(site: Site) -> None:
    site.join("a", "b", "c")
    site.table.announce("docs", Division(GENERATION, 3))
    manager = site.manager()
    manager.plan()
    held = site.table.read().collections["docs"].nodes[1]
    (free,) = {"a", "b", "c"} - set(held)
    after = manager.move(Shard("docs", 1), free)
    assert after.nodes[1] == (free, held[1])
    assert [event.facts for event in site.told("shard moved")] == [
        {"shard": "docs/1", "node": free, "before": list(held)}
    ]
    assert manager.move(Shard("docs", 1), held[1]).nodes[1] == (held[1], free), "who holds it becomes the primary"
    manager.move(Shard("docs", 1), held[1])
    assert len(site.told("shard moved")) == 2, "what is so already is not told"
    manager.plan()
    assert site.held()[1] == {held[1], free}


def test_a_move_that_a_plan_would_take_back_is_refused(site: Site) -> None:
    site.join("a", "b")
    site.table.announce("docs", Division(GENERATION, 8))
    manager = site.manager(replicas=1)
    manager.plan()

    def move_all() -> None:
        for number in range(8):
            manager.move(Shard("docs", number), "a")

    with pytest.raises(InvalidArguments, match="node a would have too many"):
        move_all()
    held = site.held()
    assert held.count({"a"}) == 5, "a quarter above its share"
    assert not manager.plan()
    assert site.held() == held


def test_moves_that_cannot_be_are_refused(site: Site) -> None:
    site.join("a")
    site.join("worker", roles=frozenset({NodeRole.WORKER}))
    site.table.announce("docs", Division(GENERATION, 1))
    manager = site.manager()
    manager.plan()
    with pytest.raises(ShardNotFound, match="docs/1"):
        manager.move(Shard("docs", 1), "a")
    with pytest.raises(ShardNotFound, match="more/0"):
        manager.move(Shard("more", 0), "a")
    with pytest.raises(NodeNotFound, match="'b'"):
        manager.move(Shard("docs", 0), "b")
    with pytest.raises(InvalidArguments, match="worker cannot hold shards"):
        manager.move(Shard("docs", 0), "worker")


# The keepers, on a real store.


@pytest.fixture
def store(tmp_path: Path) -> CollectionStore:
    """With the collection docs of four shards."""
    made = CollectionStore(str(tmp_path / "data"), shards=4)
    fill(made)
    return made


def fill(store: CollectionStore, collection: str = "docs", shards: int = 4) -> None:
    documents = [Document(text=f"text {number}") for number in range(20)]
    store.upsert(collection, documents, np.eye(20, 8), "model", new_shards=shards)


def keeper(site: Site, store: CollectionStore, node_id: str) -> ShardKeeper:
    return ShardKeeper(node_id, site.table, lambda: store, site.clock)


def test_a_node_is_ready_when_it_has_loaded_its_shards(site: Site, store: CollectionStore) -> None:
    site.join("a", "b")
    keepers = [keeper(site, store, node_id) for node_id in "ab"]
    keepers[0].step()
    assert site.table.divisions() == {"docs": Division(GENERATION, 4)}
    site.manager(replicas=1).plan()
    assert site.ready() == [set()] * 4
    keepers[0].step()
    assert site.ready() == [nodes & {"a"} for nodes in site.held()]
    keepers[1].step()
    assert site.ready() == site.held()


def test_a_fenced_node_tells_again_what_it_has_in_memory(site: Site, store: CollectionStore) -> None:
    site.join("a")
    tell_collections(site.table, store)
    manager, mine = site.manager(), keeper(site, store, "a")
    manager.plan()
    mine.step()
    assert site.ready() == [{"a"}] * 4
    site.lose("a")
    mine.step()
    assert site.ready() == [set()] * 4
    site.join("a")
    mine.step()
    assert site.ready() == [{"a"}] * 4


def test_what_redis_has_lost_is_told_again_in_time(site: Site, store: CollectionStore) -> None:
    site.join("a")
    tell_collections(site.table, store)
    site.manager().plan()
    mine = keeper(site, store, "a")
    mine.step()
    site.broker.client.delete(site.broker.keys.shards_ready("docs"))
    mine.step()
    assert site.ready() == [set()] * 4
    site.clock.advance(TELL_EVERY_S)
    mine.step()
    assert site.ready() == [{"a"}] * 4


def test_a_shard_is_let_go_when_its_new_holder_is_ready(site: Site, store: CollectionStore) -> None:
    site.join("a", "b")
    site.table.write("", {"docs": Assigned(GENERATION, (("a",),) * 4)})
    site.table.announce("docs", Division(GENERATION, 4))
    old, new = keeper(site, store, "a"), keeper(site, store, "b")
    old.step()
    site.manager(replicas=1).move(Shard("docs", 2), "b")
    old.step()
    assert site.ready()[2] == {"a"}, "nobody else could answer as quickly"
    new.step()
    assert site.ready()[2] == {"a", "b"}
    old.step()
    assert site.ready() == [{"a"}, {"a"}, {"b"}, {"a"}]


def test_a_shard_that_cannot_be_read_keeps_no_other_from_being_ready(
    site: Site, store: CollectionStore, tmp_path: Path
) -> None:
    site.join("a")
    tell_collections(site.table, store)
    site.manager().plan()
    table = tmp_path / "data" / f"{store.layout('docs').table(1)}.lance"
    hidden = table.rename(tmp_path / "hidden")
    mine = keeper(site, store, "a")
    with pytest.raises(StoreUnavailable):
        mine.step()
    assert site.ready() == [{"a"}, set(), {"a"}, {"a"}]
    hidden.rename(table)
    mine.step()
    assert site.ready() == [{"a"}] * 4


def test_a_collection_that_was_dropped_is_withdrawn_but_an_empty_store_proves_nothing(
    site: Site, store: CollectionStore, tmp_path: Path
) -> None:
    fill(store, "more", 1)
    tell_collections(site.table, store)
    elsewhere = CollectionStore(str(tmp_path / "another folder"))
    tell_collections(site.table, elsewhere)
    assert site.table.divisions() == {"docs": Division(1, 4), "more": Division(1, 1)}
    store.drop("docs")
    tell_collections(site.table, store)
    assert site.table.divisions() == {"more": Division(1, 1)}
    fill(store)
    tell_collections(site.table, store)
    assert site.table.divisions()["docs"] == Division(2, 4)


def test_a_store_that_was_made_anew_or_restored_is_believed_though_redis_knows_of_later_generations(
    site: Site, store: CollectionStore
) -> None:
    site.join("a")
    site.table.announce("docs", Division(3, 8))
    tell_collections(site.table, store)
    assert site.table.divisions() == {"docs": Division(GENERATION, 4)}
    site.manager().plan()
    keeper(site, store, "a").step()
    assert site.ready() == [{"a"}] * 4


def test_the_collections_are_looked_at_by_one_of_all(site: Site, store: CollectionStore) -> None:
    site.join("a", "b")
    keeper(site, store, "a").step()
    fill(store, "more", 1)
    keeper(site, store, "b").step()
    assert site.table.divisions().keys() == {"docs"}
    assert 0 < site.broker.client.pttl(site.broker.keys.shards_turn("look")) <= LOOK_EVERY_S * 1000
    site.broker.client.delete(site.broker.keys.shards_turn("look"))
    keeper(site, store, "b").step()
    assert site.table.divisions().keys() == {"docs", "more"}


# What a sender sees.


def test_a_sender_sees_shards_as_they_were_lately_and_while_redis_is_away(
    site: Site, redis_server: RedisServer
) -> None:
    site.join("a", "b")
    nodes = tuple(site.nodes.values())
    known = ShardMap(site.table, lambda: nodes, site.clock, 1.0)
    assert known.shares("docs") is None
    site.table.write("", {"docs": Assigned(GENERATION, (("a",), ("a",)))})
    site.table.report("a", site.epoch("a"), GENERATION, [Shard("docs", 0), Shard("docs", 1)])
    assert known.shares("docs") is None
    site.clock.advance(1.0)
    assert known.shares("docs") == Shares(GENERATION, {"a": [0, 1]})
    site.clock.advance(1.0)
    redis_server.stop()
    assert known.shares("docs") == Shares(GENERATION, {"a": [0, 1]})


def test_searches_that_are_sent_at_once_are_spread_over_the_replicas(site: Site) -> None:
    site.join("a", "b")
    nodes = tuple(site.nodes.values())
    known = ShardMap(site.table, lambda: nodes, site.clock, 1.0)
    site.table.write("", {"docs": Assigned(GENERATION, (("a", "b"),))})
    for node_id in "ab":
        site.table.report(node_id, site.epoch(node_id), GENERATION, [Shard("docs", 0)])
    asked = [next(iter(shares.of_nodes)) for _ in range(10) if (shares := known.shares("docs"))]
    assert (asked.count("a"), asked.count("b")) == (5, 5)
