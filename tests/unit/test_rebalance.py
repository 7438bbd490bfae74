"""Where jobs move when lists are out of balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.failover.rebalance import ACT_ABOVE, NodeList, make_plan
from cluster_tasks.keys import ANY_TYPE
from cluster_tasks.settings import ZONE_BOUND

TYPES = ["embedding", "llm", "retrieval"]
LLM = frozenset({"llm"})

Jobs = dict[str, list[str]]
"""The types of the jobs of each node, those that came last first."""


@st.composite
def clusters(
    draw: st.DrawFn, types: list[str] = TYPES, zones: str = "", least_listed: int = 0
) -> tuple[list[NodeList], Jobs]:
    """Lists of nodes, and what is in them: a node has jobs of types that it serves, and of any."""
    lists, jobs = [], {}
    for number in range(draw(st.integers(1, 6))):
        serves = draw(st.frozensets(st.sampled_from(types), min_size=1))
        node_id, zone = f"node{number}", draw(st.sampled_from(zones)) if zones else ""
        kinds = st.sampled_from([*sorted(serves), ANY_TYPE])
        jobs[node_id] = draw(st.lists(kinds, min_size=least_listed, max_size=40))
        lists.append(NodeList(node_id, serves, draw(st.integers(0, 8)), len(jobs[node_id]), zone))
    return lists, jobs


def apply(lists: list[NodeList], jobs: Jobs) -> tuple[list[NodeList], Jobs, list[tuple[str, str, str]]]:
    """Do what the plan says; return the cluster as it is then, and source, target and type of what was moved."""
    plan = make_plan(lists)
    after = {node_id: list(listed) for node_id, listed in jobs.items()}
    moved = []
    for source, surplus in plan.surplus.items():
        for index in reversed(range(surplus)):
            kind = after[source][index]
            if target := plan.assign(source, kind):
                del after[source][index]
                after[target].insert(0, kind)
                moved.append((source, target, kind))
    return (
        [replace(each, length=len(after[each.node_id])) for each in lists],
        after,
        moved,
    )


def share_of(node: NodeList, lists: list[NodeList]) -> float:
    """Of a cluster in which all nodes serve the same."""
    return sum(each.length for each in lists) * node.capacity / sum(each.capacity for each in lists)


@given(clusters())
def test_no_plan_makes_or_loses_a_job(cluster: tuple[list[NodeList], Jobs]) -> None:
    _, after, _ = apply(*cluster)
    before = Counter(kind for listed in cluster[1].values() for kind in listed)
    assert Counter(kind for listed in after.values() for kind in listed) == before


@given(clusters())
def test_a_job_only_goes_to_a_node_that_serves_it_and_may_be_given_jobs(cluster: tuple[list[NodeList], Jobs]) -> None:
    lists, jobs = cluster
    by_id = {each.node_id: each for each in lists}
    for source, target, kind in apply(lists, jobs)[2]:
        assert kind in by_id[target].serves or (kind == ANY_TYPE and by_id[target].serves & by_id[source].serves)
        assert by_id[target].capacity > 0
        assert target != source


@given(clusters(["llm"]))
def test_nobody_gets_more_than_his_share_and_nobody_gives_below_it(cluster: tuple[list[NodeList], Jobs]) -> None:
    lists, jobs = cluster
    after, _, moved = apply(lists, jobs)
    for old, new in zip(lists, after, strict=True):
        if new.length > old.length:
            assert new.length <= ceil(share_of(old, lists))
        elif new.length < old.length:
            assert old.length > ACT_ABOVE * share_of(old, lists)
            assert new.length >= ceil(share_of(old, lists))
    assert not {source for source, _, _ in moved} & {target for _, target, _ in moved}


@given(clusters(["llm"]))
def test_no_list_stays_above_its_share_by_more_than_the_factor(cluster: tuple[list[NodeList], Jobs]) -> None:
    after, _, _ = apply(*cluster)
    if any(each.capacity for each in after):
        for each in after:
            assert each.length <= max(ceil(share_of(each, after)), ACT_ABOVE * share_of(each, after))


@given(clusters())
def test_what_is_balanced_stays_as_it_is(cluster: tuple[list[NodeList], Jobs]) -> None:
    lists, jobs = cluster
    givers: set[str] = set()
    # Where types differ, jobs that nobody else may take can hide others for a while.
    for _ in range(100):
        lists, jobs, moved = apply(lists, jobs)
        if not moved:
            break
        givers |= {source for source, _, _ in moved}
        assert not givers & {target for _, target, _ in moved}
    assert apply(lists, jobs)[2] == []


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 200))
def test_two_nodes_share_by_their_capacity(mine: int, yours: int, length: int) -> None:
    lists = [NodeList("a", LLM, mine, length), NodeList("b", LLM, yours, 0)]
    after, _, _ = apply(lists, {"a": ["llm"] * length, "b": []})
    share = share_of(lists[0], lists)
    # 1.2 - 1 is a little less than 0.2.
    assert abs(after[0].length - share) <= max(1, (ACT_ABOVE - 1) * share + 1e-9)


def test_nodes_without_a_type_in_common_do_not_count_for_each_other() -> None:
    lists = [NodeList("a", LLM, 2, 30), NodeList("b", LLM, 2, 30), NodeList("c", frozenset({"embedding"}), 2, 0)]
    assert not make_plan(lists).surplus


def test_a_list_that_is_little_too_long_is_left_alone() -> None:
    assert not make_plan([NodeList("a", LLM, 1, 60), NodeList("b", LLM, 1, 40)]).surplus
    assert make_plan([NodeList("a", LLM, 1, 61), NodeList("b", LLM, 1, 40)]).surplus == {"a": 10}


def test_a_node_that_may_not_be_given_jobs_gives_all_it_has() -> None:
    plan = make_plan([NodeList("a", LLM, 0, 3), NodeList("b", LLM, 2, 10)])
    assert (plan.surplus, plan.room) == ({"a": 3}, {"b": 3})


def capacity_of(zone: str, lists: list[NodeList]) -> int:
    return sum(each.capacity for each in lists if each.zone == zone)


def loads(lists: list[NodeList]) -> dict[str, float]:
    """How many times its share of all jobs each zone has."""
    mean = sum(each.length for each in lists) / sum(each.capacity for each in lists)
    zones = {each.zone for each in lists}
    lengths = {zone: sum(each.length for each in lists if each.zone == zone) for zone in zones}
    return {zone: lengths[zone] / capacity_of(zone, lists) / mean for zone in zones}


@given(clusters(["llm"], "ab", 1))
def test_within_the_bound_zones_keep_what_they_have_and_are_balanced_in_themselves(
    cluster: tuple[list[NodeList], Jobs],
) -> None:
    lists, jobs = cluster
    zones = {each.node_id: each.zone for each in lists}
    if any(not capacity_of(zone, lists) for zone in zones.values()) or max(loads(lists).values()) > ZONE_BOUND:
        return
    after, _, moved = apply(lists, jobs)
    assert all(zones[source] == zones[target] for source, target, _ in moved)
    for each in after:
        own = [other for other in after if other.zone == each.zone]
        assert each.length <= max(ceil(share_of(each, own)), ACT_ABOVE * share_of(each, own))


@given(clusters(zones="ab"))
def test_no_zone_is_left_idle_while_another_queues(cluster: tuple[list[NodeList], Jobs]) -> None:
    """As far as jobs can be moved at all: a plan that knows no zones is the measure."""
    lists, jobs = cluster
    idle = [each.node_id for each in lists if each.capacity and not each.length]
    without_zones = [replace(each, zone="") for each in lists]
    given = {target for _, target, _ in apply(lists, jobs)[2]} & set(idle)
    assert bool(given) == bool({target for _, target, _ in apply(without_zones, jobs)[2]} & set(idle))


@given(clusters(["llm"], "ab"))
def test_a_zone_above_the_bound_is_evened_out_over_all(cluster: tuple[list[NodeList], Jobs]) -> None:
    lists, jobs = cluster
    zones = [each.zone for each in lists]
    if not any(jobs.values()) or any(not capacity_of(zone, lists) for zone in zones):
        return
    if max(loads(lists).values()) <= ZONE_BOUND:
        return
    for each in apply(lists, jobs)[0]:
        assert each.length <= max(ceil(share_of(each, lists)), ACT_ABOVE * share_of(each, lists))


@given(clusters(["llm"], "ab"))
def test_zones_come_to_rest(cluster: tuple[list[NodeList], Jobs]) -> None:
    lists, jobs = cluster
    for _ in range(3):
        lists, jobs, moved = apply(lists, jobs)
        if not moved:
            return
    assert apply(lists, jobs)[2] == []


def test_of_two_nodes_with_room_the_one_in_the_same_zone_is_given_the_jobs() -> None:
    lists = [NodeList("a1", LLM, 2, 40, "a"), NodeList("a2", LLM, 2, 0, "a"), NodeList("b1", LLM, 2, 0, "b")]
    plan = make_plan(lists)
    assert [plan.assign("a1", "llm") for _ in range(20)] == ["a2"] * 14 + ["b1"] * 6


def test_a_zone_that_drains_gives_to_the_others() -> None:
    lists = [NodeList("a1", LLM, 0, 4, "a"), NodeList("b1", LLM, 2, 10, "b"), NodeList("b2", LLM, 2, 10, "b")]
    plan = make_plan(lists)
    assert plan.surplus == {"a1": 4}
    assert {plan.assign("a1", "llm") for _ in range(4)} == {"b1", "b2"}
