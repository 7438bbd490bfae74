"""Which cluster a job had better be sent to, and what joined registries tell when one of them is away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.clock import ManualClock
from cluster_tasks.errors import RegistryUnavailable
from cluster_tasks.model import Capacity, EventType, Load, Node, NodeEvent, NodeFilter
from cluster_tasks.registry import MemoryRegistry
from cluster_tasks.registry.base import ALL
from cluster_tasks.registry.joined import OWN, ClusterNodes, JoinedRegistries, where_to_send


def node(held: int, slots: int = 4, node_id: str = "n", serves: str = "llm") -> Node:
    return Node(
        id=node_id, serves=frozenset({serves}), capacity=Capacity(max_connections=slots),
        load=Load(current_connections=held),
    )  # fmt: skip


loads = st.lists(st.builds(node, held=st.integers(0, 6)), max_size=3)
clusters = st.dictionaries(st.sampled_from(["east", "north", "west"]), loads).map(
    lambda found: [ClusterNodes(name, nodes) for name, nodes in found.items()]
)


def share(nodes: Sequence[Node]) -> float:
    return sum(each.load.current_connections for each in nodes) / sum(each.capacity.max_connections for each in nodes)


@given(own=loads, joined=clusters)
def test_a_job_stays_at_home_while_a_slot_is_free_there_or_none_elsewhere(
    own: list[Node], joined: list[ClusterNodes]
) -> None:
    chosen = where_to_send("llm", own, joined)
    able = {each.name: share(each.nodes) for each in joined if each.nodes}
    if own and (share(own) < 1 or min(able.values(), default=1) >= 1):
        assert chosen == OWN
    elif able:
        assert able[chosen] == min(able.values())
    else:
        assert chosen == OWN


def test_only_nodes_that_may_take_the_type_count() -> None:
    full, free = node(4), node(0)
    assert where_to_send("llm", [full], [ClusterNodes("east", [node(0, serves="ocr")])]) == OWN
    assert where_to_send("llm", [full], [ClusterNodes("east", [free.model_copy(update={"limit": "ejected"})])]) == OWN
    assert where_to_send("llm", [full], [ClusterNodes("east", [free])]) == "east"
    assert where_to_send("ocr", [free], [ClusterNodes("east", [node(9, serves="ocr")])]) == "east"


def test_a_cluster_whose_registry_is_away_is_none_to_send_to() -> None:
    assert where_to_send("llm", [node(4)], [ClusterNodes("east", away="it does not answer")]) == OWN


class Away:
    """A registry that does not answer, and fails in its own way when it is watched."""

    def list(self, where: NodeFilter = ALL) -> Sequence[Node]:
        raise RegistryUnavailable("listing the nodes: no route to host")

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        while not stop.wait(0.01):
            yield from ()


class Broken(Away):
    """A registry with a defect."""

    def watch(self, stop: Event) -> Iterator[NodeEvent]:
        raise ZeroDivisionError


def memory(*nodes: Node) -> MemoryRegistry:
    registry = MemoryRegistry(ManualClock())
    for each in nodes:
        registry.register(each)
    return registry


def test_one_that_does_not_answer_hides_no_other_and_says_why() -> None:
    joined = JoinedRegistries(lambda: {"west": memory(node(1, node_id="w")), "east": Away()})
    east, west = joined.read()
    assert (east.name, east.nodes, east.away) == ("east", (), "listing the nodes: no route to host")
    assert (west.name, [each.id for each in west.nodes], west.away) == ("west", ["w"], "")
    assert JoinedRegistries(dict).read() == ()


def test_changes_of_all_are_told_with_their_names() -> None:
    east, west, stop = memory(node(0, node_id="n")), memory(), Event()
    told = JoinedRegistries(lambda: {"east": east, "west": west, "north": Away()}).watch(stop)
    first = next(told)
    assert (first.name, first.event.type, first.event.node.id) == ("east", EventType.JOINED, "n")
    west.register(node(0, node_id="n"))
    second = next(told)
    assert (second.name, second.event.type) == ("west", EventType.JOINED)
    stop.set()
    assert list(told) == []


def test_a_watch_that_fails_is_no_watch_that_tells_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        next(JoinedRegistries(lambda: {"east": Broken()}).watch(Event()))


def test_registries_are_opened_when_they_are_asked_and_once() -> None:
    opened: list[str] = []

    def open_all() -> dict[str, MemoryRegistry]:
        opened.append("all")
        return {"east": memory()}

    joined = JoinedRegistries(open_all)
    assert opened == []
    joined.read()
    joined.read()
    assert opened == ["all"]
