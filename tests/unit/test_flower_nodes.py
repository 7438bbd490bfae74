"""How the cluster page sees nodes."""

from __future__ import annotations

from typing import Any

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.clock import ManualClock
from cluster_tasks.failover.events import ClusterEvent
from cluster_tasks.flower.nodes import LOST_SHOWN_S, Beats, node_rows
from cluster_tasks.model import Node

NOW = 1_000_000.0


def event(kind: str, ago_s: float = 1.0, node: str = "a", epoch: str = "1-a", **facts: Any) -> ClusterEvent:
    return ClusterEvent(f"{NOW - ago_s}-0", kind, NOW - ago_s, {"node": node, "epoch": epoch, **facts})


def statuses(*events: ClusterEvent, nodes: tuple[Node, ...] = (), beats: dict[str, Beat] | None = None) -> Any:
    return {row["id"]: row["status"] for row in node_rows(nodes, beats or {}, {}, events, NOW)}


def test_a_counter_that_moves_is_never_still() -> None:
    clock = ManualClock()
    beats = Beats(clock)
    assert beats.still_s({"a": Beat("1-a", 1)}) == {"a": 0}
    clock.advance(3)
    assert beats.still_s({"a": Beat("1-a", 2)}) == {"a": 0}
    clock.advance(3)
    assert beats.still_s({"a": Beat("1-a", 2), "b": Beat("2-b", 0)}) == {"a": 3, "b": 0}
    clock.advance(1)
    assert beats.still_s({"a": Beat("3-a", 2), "b": Beat("2-b", 0)}) == {"a": 0, "b": 1}, "another epoch has begun"


def test_nobody_is_still_for_an_outage_of_redis() -> None:
    clock = ManualClock()
    beats = Beats(clock)
    beats.still_s({"a": Beat("1-a", 1)})
    clock.advance(60)
    beats.interrupted()
    assert beats.still_s({"a": Beat("1-a", 1)}) == {"a": 0}


def test_a_lost_node_is_shown_for_a_while() -> None:
    assert statuses(event("node lost")) == {"a": "lost"}
    assert statuses(event("node lost", LOST_SHOWN_S + 1)) == {}


def test_a_node_that_came_back_or_left_is_not_lost() -> None:
    assert statuses(event("node lost", 2), event("node joined", epoch="2-a")) == {}
    assert statuses(event("node lost", 2), event("node left", epoch="2-a")) == {}
    assert statuses(event("node joined", 2), event("node lost")) == {"a": "lost"}
    assert statuses(event("node lost"), beats={"a": Beat("2-a", 1)}) == {"a": "unregistered"}


def test_a_record_of_an_epoch_that_has_ended_is_no_node() -> None:
    old = Node(id="a", epoch="1-a")
    assert statuses(nodes=(old,)) == {}
    assert statuses(event("node lost"), nodes=(old,)) == {"a": "lost"}
    assert statuses(nodes=(old,), beats={"a": Beat("2-a", 1)}) == {"a": "unregistered"}
    assert statuses(nodes=(old,), beats={"a": Beat("1-a", 1)}) == {"a": "online"}


def test_only_the_jobs_of_the_lost_epoch_are_told_of() -> None:
    events = [event("node lost", 3), event("jobs moved", 2, held=2, listed=5), event("jobs moved", epoch="0-a", held=9)]
    (row,) = node_rows([], {}, {}, events, NOW)
    assert row == {"id": "a", "status": "lost", "epoch": "1-a", "lost_s": 3.0, "moved": {"held": 2, "listed": 5}}


def test_a_node_is_shown_with_its_zone() -> None:
    nodes = (Node(id="a", epoch="1-a", metadata={"zone": "west"}), Node(id="b", epoch="2-b"))
    beats = {node.id: Beat(node.epoch, 1) for node in nodes}
    assert [row["zone"] for row in node_rows(nodes, beats, {}, (), NOW)] == ["west", ""]
