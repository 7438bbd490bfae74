"""A caller's zone first, whatever the strategy, and the others when it has too much to do."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster_tasks.balancing import strategy_names
from cluster_tasks.balancing.zones import Carried, Zones, has_room
from cluster_tasks.clock import ManualClock
from cluster_tasks.keys import Keys
from cluster_tasks.model import ZONE, Capacity, Load, Node, NodeStatus, Request
from cluster_tasks.router import ClusterRouter, ClusterView
from cluster_tasks.settings import ZONE_BOUND, ClusterSettings

KEYS = Keys("cluster")
bounds = st.sampled_from([1.0, 1.25, 2.0, float("inf")])
slots = st.integers(1, 40)
with_a_free_slot = slots.flatmap(lambda some: st.builds(Carried, st.integers(0, some - 1), st.just(some)))
full = slots.flatmap(lambda some: st.builds(Carried, st.integers(some, 200), st.just(some)))
carried = st.builds(Carried, in_flight=st.integers(0, 200), slots=slots)


def node(node_id: str, zone: str = "", *, slots: int = 2, in_flight: int = 0, **fields: object) -> Node:
    return Node(
        id=node_id,
        serves=frozenset({"llm"}),
        capacity=Capacity(max_connections=slots),
        load=Load(current_connections=min(in_flight, slots), queue_length=max(0, in_flight - slots)),
        metadata={ZONE: zone} if zone else {},
        **fields,  # type: ignore[arg-type]
    )


def router(nodes: Callable[[], Sequence[Node]], **settings: object) -> ClusterRouter:
    """A router whose view is read anew whenever its clock is asked: it has no thread of its own."""
    view = ClusterView(nodes, ManualClock(), snapshot_s=1000)
    view.refresh()
    return ClusterRouter(ClusterSettings(**settings), view, ManualClock(), random.Random(1))  # type: ignore[arg-type]


def placed(routed: ClusterRouter, times: int, strategy: str, affinity: str = "") -> Counter[str]:
    queues = (routed.place(Request("llm", affinity=affinity), strategy) for _ in range(times))
    return Counter(KEYS.node_of(queue) or queue for queue in queues)


# The rule.


@given(near=with_a_free_slot, far=carried, bound=bounds)
def test_a_zone_with_a_free_slot_has_room(near: Carried, far: Carried, bound: float) -> None:
    assert has_room(near, far, bound)


@given(near=full, far=carried, bound=bounds)
def test_a_full_zone_has_room_within_the_bound_and_not_above(near: Carried, far: Carried, bound: float) -> None:
    every = near + far
    own, mean = (near.in_flight + 1) / near.slots, (every.in_flight + 1) / every.slots
    assume(abs(own - bound * mean) > 1e-9)
    assert has_room(near, far, bound) == (own < bound * mean)


@given(near=carried, bound=bounds)
def test_a_zone_that_is_all_there_is_has_room(near: Carried, bound: float) -> None:
    assert has_room(near, Carried(), bound)


@given(near=with_a_free_slot, far=carried, bound=st.sampled_from([1.0, 1.25, 2.0]), jobs=st.integers(1, 100))
def test_no_zone_is_filled_above_the_bound(near: Carried, far: Carried, bound: float, jobs: int) -> None:
    for _ in range(jobs):
        if not has_room(near, far, bound):
            far += Carried(in_flight=1)
            continue
        near += Carried(in_flight=1)
        every = near + far
        assert near.in_flight <= near.slots or near.in_flight * every.slots <= bound * every.in_flight * near.slots


@given(near=carried, far=carried, bound=bounds)
def test_more_load_elsewhere_never_drives_a_job_out(near: Carried, far: Carried, bound: float) -> None:
    if has_room(near, far, bound):
        assert has_room(near, far + Carried(in_flight=1), bound)


# The nodes of a snapshot.

members = st.builds(
    node,
    st.sampled_from([f"n{number}" for number in range(8)]),
    st.sampled_from(["", "a", "b", "c"]),
    slots=st.integers(0, 4),
    in_flight=st.integers(0, 9),
)
snapshots = st.lists(members, min_size=1, max_size=8, unique_by=lambda each: each.id).map(tuple)


@given(nodes=snapshots)
def test_a_snapshot_is_split_without_losing_a_node(nodes: tuple[Node, ...]) -> None:
    zones = Zones(nodes, "a", ZONE_BOUND)
    assert sorted(each.id for each in zones.near + zones.far) == sorted(each.id for each in nodes)
    assert {each.zone for each in zones.near} <= {"a"}
    assert all(zones.holds(each) == (each.zone == "a") for each in nodes)


@given(nodes=snapshots, strategy=st.sampled_from(strategy_names()), jobs=st.integers(1, 30))
def test_every_strategy_gets_the_zone_that_the_rule_says(nodes: tuple[Node, ...], strategy: str, jobs: int) -> None:
    routed, zones = router(lambda: nodes, zone="a"), Zones(nodes, "a", ZONE_BOUND)
    by_id = {each.id: each for each in nodes}
    for _ in range(jobs):
        near = zones.is_near()
        zones.count(near)
        [chosen] = placed(routed, 1, strategy, affinity="key")
        assert zones.holds(by_id[chosen]) == near


# The router.


@pytest.mark.parametrize("strategy", strategy_names())
def test_jobs_stay_in_the_zone_of_the_caller_while_it_has_free_slots(strategy: str) -> None:
    nodes = [node(f"{zone}{number}", zone) for zone in "ab" for number in range(4)]
    for zone in "ab":
        chosen = placed(router(lambda: nodes, zone=zone), 8, strategy)
        assert {node_id[0] for node_id in chosen} == {zone}


@pytest.mark.parametrize("strategy", strategy_names())
def test_a_caller_without_a_zone_uses_them_all(strategy: str) -> None:
    nodes = [node(f"{zone}{number}", zone, slots=4) for zone in "ab" for number in range(3)]
    chosen = placed(router(lambda: nodes), 60, strategy)
    assert {node_id[0] for node_id in chosen} == {"a", "b"}


@pytest.mark.parametrize("strategy", strategy_names())
def test_above_the_bound_jobs_spill_over_until_both_zones_are_as_the_rule_wants_them(strategy: str) -> None:
    nodes = [node(f"{zone}{number}", zone) for zone in "ab" for number in range(4)]
    chosen = placed(router(lambda: nodes, zone="a"), 160, strategy)
    near = sum(count for node_id, count in chosen.items() if node_id[0] == "a")
    # Of 160 jobs the bound lets half of the slots have 1.25 times the mean: 100.
    assert near == 100
    # They are spread there as well.
    assert len(chosen) == 8


@pytest.mark.parametrize("strategy", strategy_names())
def test_another_bound_lets_more_or_less_spill_over(strategy: str) -> None:
    nodes = [node(f"{zone}{number}", zone) for zone in "ab" for number in range(4)]

    def kept(bound: float) -> int:
        chosen = placed(router(lambda: nodes, zone="a", zone_bound=bound), 160, strategy)
        return sum(count for node_id, count in chosen.items() if node_id[0] == "a")

    assert [kept(bound) for bound in (1.0, 1.5, float("inf"))] == [80, 120, 160]


@pytest.mark.parametrize("strategy", strategy_names())
@pytest.mark.parametrize("out", [{"status": NodeStatus.DRAINING}, {"status": NodeStatus.OFFLINE}, {"limit": "ejected"}])
def test_a_zone_without_a_node_that_may_be_given_jobs_is_passed_over(strategy: str, out: dict[str, object]) -> None:
    nodes = [node("a1", "a", **out), node("b1", "b"), node("c1")]
    assert set(placed(router(lambda: nodes, zone="a"), 20, strategy)) == {"b1", "c1"}


@pytest.mark.parametrize("strategy", strategy_names())
def test_a_zone_in_which_nobody_is_left_spills_over_with_the_next_snapshot(strategy: str) -> None:
    nodes = [node("a1", "a"), node("b1", "b")]
    routed = router(lambda: nodes, zone="a")
    assert set(placed(routed, 2, strategy)) == {"a1"}
    del nodes[0]
    routed._view.refresh()
    assert set(placed(routed, 2, strategy)) == {"b1"}
    nodes.insert(0, node("a1", "a"))
    routed._view.refresh()
    assert set(placed(routed, 2, strategy)) == {"a1"}


def test_a_key_keeps_its_node_whatever_joins_and_leaves_elsewhere() -> None:
    """Consistent hash: while the zone has room its ring is its own."""
    near = [node(f"a{number}", "a", slots=8) for number in range(5)]
    far: list[Node] = []
    routed = router(lambda: near + far, zone="a")
    keys = [f"session {number}" for number in range(15)]
    homes = {key: placed(routed, 1, "consistent_hash", key) for key in keys}
    for others in range(1, 5):
        far.append(node(f"b{others}", "b", in_flight=others))
        routed._view.refresh()
        assert {key: placed(routed, 1, "consistent_hash", key) for key in keys} == homes


def test_a_key_that_spills_over_goes_to_one_node_there() -> None:
    nodes = [node("a1", "a", in_flight=400)] + [node(f"b{number}", "b", in_flight=20) for number in range(8)]
    chosen = placed(router(lambda: nodes, zone="a"), 4, "consistent_hash", "session")
    assert len(chosen) == 1
    assert "a1" not in chosen


def test_the_node_that_a_task_asks_for_comes_before_the_zone_and_counts_for_it() -> None:
    nodes = [node("a1", "a", slots=1), node("b1", "b", slots=1)]
    routed = router(lambda: nodes, zone="a")
    assert routed.place(Request("llm"), "least_connection", preferred="b1") == "node.b1"
    # With two jobs there, a second one here is within the bound.
    queues = [routed.place(Request("llm"), "least_connection") for _ in range(3)]
    assert queues == ["node.a1", "node.b1", "node.a1"]


def test_nobody_serves_it_in_any_zone() -> None:
    routed = router(lambda: [node("a1", "a")], zone="a")
    assert routed.place(Request("ocr"), "least_connection") == "waiting.ocr"
