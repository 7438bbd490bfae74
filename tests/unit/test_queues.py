"""What the views of queues and nodes show, and what they leave out where there is no room."""

from __future__ import annotations

from typing import Any

from cluster_tasks import Node, NodeRole
from cluster_tasks.cli.live import View, first_rows
from cluster_tasks.cli.queues import Kind, rows
from cluster_tasks.keys import Keys
from cluster_tasks.model import Capacity, Load, NodeStatus

KEYS = Keys("shop")


def node_of(name: str, *serves: str, **fields: Any) -> Node:
    load, capacity = Load(current_connections=1), Capacity(max_connections=4)
    return Node(id=f"{name}@x", serves=frozenset(serves), load=load, capacity=capacity, **fields)


NODES = [
    node_of("a", "llm"), node_of("b", "llm", "embedding"), node_of("c", "llm", status=NodeStatus.DRAINING),
    Node(id="chief@x", roles=frozenset({NodeRole.MASTER})),
]  # fmt: skip


def test_each_list_tells_who_takes_from_it() -> None:
    lengths = {
        "shop.node.a@x": 3, "shop.node.b@x.bound": 1, "shop.waiting.llm": 5, "shop.waiting.any": 1,
        "shop.suspect.embedding": 2, "shop.delayed": 4, "shop.control": 1,
    }  # fmt: skip
    found = {row.queue: (row.kind, row.jobs, row.takers) for row in rows(KEYS, NODES, lengths)}
    assert found == {
        "shop.node.a@x": (Kind.NODE, 3, ["a@x"]),
        "shop.node.b@x": (Kind.NODE, 0, ["b@x"]),
        "shop.node.c@x": (Kind.NODE, 0, []),
        "shop.node.b@x.bound": (Kind.BOUND, 1, ["b@x"]),
        "shop.waiting.llm": (Kind.WAITING, 5, ["a@x", "b@x"]),
        "shop.waiting.any": (Kind.WAITING, 1, ["a@x", "b@x"]),
        "shop.suspect.embedding": (Kind.SUSPECT, 2, ["b@x"]),
        "shop.delayed": (Kind.DELAYED, 4, ["a@x", "b@x"]),
        "shop.control": (Kind.CONTROL, 1, ["chief@x"]),
    }


def test_what_takers_hold_and_can_hold_is_summed_up() -> None:
    (row, *_) = rows(KEYS, NODES, {"shop.waiting.llm": 5})
    assert (row.held, row.slots) == (2, 8)


def test_a_list_that_nobody_takes_from_comes_first_and_then_the_longest() -> None:
    lengths = {"shop.waiting.llm": 9, "shop.waiting.ocr": 1, "shop.node.a@x": 2}
    found = rows(KEYS, NODES, lengths)
    assert [row.queue for row in found[:3]] == ["shop.waiting.ocr", "shop.waiting.llm", "shop.node.a@x"]
    assert [row.stuck for row in found[:2]] == [True, False]


def test_delayed_jobs_are_not_stuck_for_having_no_taker_yet() -> None:
    assert not any(row.stuck for row in rows(KEYS, [], {"shop.delayed": 3}))


def view(*urgent: bool) -> View:
    return View(rows=[(str(number),) for number in range(len(urgent))], document=[], urgent=urgent)


def test_where_there_is_room_all_rows_are_shown_in_their_order() -> None:
    assert first_rows(view(False, True, False), 3) == [("0",), ("1",), ("2",)]


def test_urgent_rows_are_the_last_to_be_left_out() -> None:
    assert first_rows(view(False, False, False, True), 2) == [("0",), ("3",)]
    assert first_rows(View(rows=[("0",), ("1",)], document=[]), 1) == [("0",)]
