"""Who holds which shards, what moves when nodes come and go, and whom a search asks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from math import ceil, floor, inf, nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_tasks.shards.levelling import fair_shares
from cluster_tasks.shards.placement import Assignment, Holder, Move, Shard, cover, moves, place

EPSILON = 1e-6
in_its_own_time = settings(deadline=None)
with_many_shards = settings(deadline=None, max_examples=25)
replica_counts = st.integers(1, 4)


def shards_of(count: int) -> list[Shard]:
    """In two collections, if there are enough."""
    return [Shard("papers" if number % 3 else "mail", number) for number in range(count)]


shard_lists = st.integers(1, 60).map(shards_of)
many_shards = st.integers(150, 250).map(shards_of)


@st.composite
def holder_lists(
    draw: st.DrawFn, least: int = 1, most: int = 9, sizes: tuple[float, ...] = (1, 1.5, 2, 8), zones: str = "abcd"
) -> list[Holder]:
    count = draw(st.integers(least, most))
    return [
        Holder(f"n{number}@host", draw(st.sampled_from(sizes)), draw(st.sampled_from(zones))) for number in range(count)
    ]


def alike(least: int, most: int = 9, zones: int = 1) -> st.SearchStrategy[list[Holder]]:
    """Nodes of one size, as many in each zone."""
    return st.integers(least, most).map(
        lambda count: [Holder(f"n{number}@host", 2.0, f"z{number % zones}") for number in range(count * zones)]
    )


@st.composite
def any_plans(draw: st.DrawFn, shards: list[Shard]) -> Assignment:
    """What a node may find written: also of nodes that are gone, twice, too many, in one zone."""
    ids = st.lists(st.integers(0, 11).map("n{}@host".format), max_size=5).map(tuple)
    return draw(st.dictionaries(st.sampled_from(shards), ids))


def loads(plan: Assignment) -> Counter[str]:
    return Counter(node_id for node_ids in plan.values() for node_id in node_ids)


def primaries(plan: Assignment) -> Counter[str]:
    return Counter(node_ids[0] for node_ids in plan.values() if node_ids)


def zones_of(node_ids: tuple[str, ...], holders: list[Holder]) -> set[str]:
    return {holder.zone for holder in holders if holder.node_id in node_ids}


def shares_of(holders: list[Holder], shards: int, replicas: int) -> dict[str, float]:
    capacities = {holder.node_id: holder.capacity for holder in holders}
    zones = {holder.node_id: holder.zone for holder in holders}
    return fair_shares(capacities, zones, shards, min(replicas, len(holders)))


def quarter_above(share: float) -> int:
    """1.25 of the share, or the share rounded up where shards are few."""
    return ceil(1.25 * share - EPSILON) if share < 4 else floor(1.25 * share + EPSILON)


def loaded(before: Assignment, after: Assignment) -> Counter[str]:
    """How many copies each node has to load."""
    return Counter(node_id for move in moves(before, after) for node_id in move.loads)


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts, order=st.randoms(), data=st.data())
def test_a_plan_does_not_depend_on_the_order_of_what_it_is_made_of(
    shards, holders, replicas, order: Random, data
) -> None:
    current = data.draw(any_plans(shards))
    plan = place(shards, holders, replicas, current)
    shuffled = dict(order.sample(list(current.items()), len(current)))
    assert place(order.sample(shards, len(shards)), order.sample(holders, len(holders)), replicas, shuffled) == plan
    assert place(iter(shards + shards), iter(holders), replicas, current) == plan


def test_every_process_and_release_makes_the_same_plan() -> None:
    # The list of what was planned is fixed: in a rolling deploy, two releases plan for one cluster.
    program = (
        "from cluster_tasks.shards.placement import Holder, Shard, place\n"
        "holders = [Holder(f'n{n}', 1 + n % 2, f'z{n % 3}') for n in range(5)]\n"
        "plan = place([Shard('papers', n) for n in range(6)], holders, 2)\n"
        "print(*(str(shard) + '=' + '+'.join(ids) for shard, ids in plan.items()))\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {"papers/0=n1+n0 papers/1=n3+n1 papers/2=n3+n4 papers/3=n2+n3 papers/4=n1+n3 papers/5=n0+n1"}


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts, data=st.data())
def test_each_shard_has_as_many_nodes_as_asked_or_all(shards, holders, replicas, data) -> None:
    plan = place(shards, holders, replicas, data.draw(any_plans(shards)))
    assert list(plan) == sorted(shards)
    for node_ids in plan.values():
        assert len(set(node_ids)) == len(node_ids) == min(replicas, len(holders))
        assert set(node_ids) <= {holder.node_id for holder in holders}


@in_its_own_time
@given(shards=shard_lists, replicas=replica_counts, data=st.data())
def test_without_nodes_nobody_holds_a_shard(shards, replicas, data) -> None:
    assert place(shards, [], replicas, data.draw(any_plans(shards))) == dict.fromkeys(shards, ())


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts, data=st.data())
def test_the_copies_of_a_shard_lie_in_as_many_zones_as_there_are(shards, holders, replicas, data) -> None:
    reachable = min(replicas, len(holders), len({holder.zone for holder in holders}))
    for node_ids in place(shards, holders, replicas, data.draw(any_plans(shards))).values():
        assert len(zones_of(node_ids, holders)) == reachable


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts, data=st.data())
def test_no_node_is_loaded_beyond_its_bound_whatever_was_before(shards, holders, replicas, data) -> None:
    plan = place(shards, holders, replicas, data.draw(any_plans(shards)))
    load = loads(plan)
    for node_id, share in shares_of(holders, len(shards), replicas).items():
        assert load[node_id] <= quarter_above(share)


@with_many_shards
@given(
    shards=many_shards,
    holders=st.one_of(alike(3), alike(2, 4, zones=2), alike(1, 3, zones=3)),
    replicas=st.integers(1, 3),
)
def test_with_many_shards_no_node_has_more_than_a_quarter_above_the_mean(shards, holders, replicas) -> None:
    load = loads(place(shards, holders, replicas))
    assert max(load.values()) <= 1.25 * load.total() / len(holders)
    assert min(load[holder.node_id] for holder in holders) >= load.total() / len(holders) / 1.25


@with_many_shards
@given(shards=many_shards, holders=holder_lists(least=6, sizes=(2, 3, 4), zones="a"))
def test_larger_nodes_hold_more(shards, holders) -> None:
    load = loads(place(shards, holders, 2))
    mean = load.total() / sum(holder.capacity for holder in holders)
    for holder in holders:
        assert mean / 1.25 <= load[holder.node_id] / holder.capacity <= mean * 1.25


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts)
def test_no_node_has_more_than_its_part_of_the_primaries(shards, holders, replicas) -> None:
    plan = place(shards, holders, replicas)
    first, load = primaries(plan), loads(plan)
    for holder in holders:
        assert first[holder.node_id] <= quarter_above(load[holder.node_id] / min(replicas, len(holders)))


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts, data=st.data())
def test_a_plan_that_comes_back_keeps_all_copies(shards, holders, replicas, data) -> None:
    plan = place(shards, holders, replicas, data.draw(any_plans(shards)))
    assert moves(plan, place(shards, holders, replicas, plan)) == []


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(), replicas=replica_counts)
def test_a_first_plan_that_comes_back_keeps_its_primaries_too(shards, holders, replicas) -> None:
    plan = place(shards, holders, replicas)
    assert place(shards, holders, replicas, plan) == plan


@with_many_shards
@given(shards=many_shards, holders=holder_lists(least=2), replicas=replica_counts, data=st.data())
def test_of_a_lost_node_little_more_moves_than_its_own_copies(shards, holders, replicas, data) -> None:
    lost = data.draw(st.sampled_from(holders))
    before = place(shards, holders, replicas)
    after = place(shards, [holder for holder in holders if holder != lost], replicas, before)
    assert loaded(before, after).total() <= 1.1 * loads(before)[lost.node_id]


@in_its_own_time
@given(shards=shard_lists, holders=alike(3), replicas=st.integers(1, 2), data=st.data())
def test_of_a_few_shards_too_only_those_of_the_lost_node_move(shards, holders, replicas, data) -> None:
    lost = data.draw(st.sampled_from(holders))
    before = place(shards, holders, replicas)
    after = place(shards, [holder for holder in holders if holder != lost], replicas, before)
    assert {move.shard for move in moves(before, after)} == {s for s, ids in before.items() if lost.node_id in ids}


@with_many_shards
@given(shards=st.one_of(shard_lists, many_shards), holders=holder_lists(least=2), data=st.data())
def test_after_a_lost_primary_comes_a_replica_that_is_left(shards, holders, data) -> None:
    lost = data.draw(st.sampled_from(holders))
    before = place(shards, holders, 3)
    after = place(shards, [holder for holder in holders if holder != lost], 3, before)
    for shard, node_ids in before.items():
        if node_ids[0] == lost.node_id:
            assert after[shard][0] in node_ids[1:]


@with_many_shards
@given(shards=many_shards, holders=alike(3, zones=2), data=st.data())
def test_nodes_that_go_one_after_the_other_leave_a_plan_in_balance(shards, holders, data) -> None:
    plan = place(shards, holders, 2)
    while len({holder.zone for holder in holders}) == 2:
        lost = data.draw(st.sampled_from(holders))
        holders = [holder for holder in holders if holder != lost]
        plan = place(shards, holders, 2, plan)
        load = loads(plan)
        for node_id, share in shares_of(holders, len(shards), 2).items():
            assert floor(share / 1.25) <= load[node_id] <= quarter_above(share)


@in_its_own_time
@given(shards=shard_lists, holders=holder_lists(zones="a"), size=st.sampled_from([1, 2, 8]))
def test_a_node_that_joins_is_given_its_share(shards, holders, size) -> None:
    joined = [*holders, Holder("new@host", size, "a")]
    after = place(shards, joined, 2, place(shards, holders, 2))
    share = shares_of(joined, len(shards), 2)["new@host"]
    assert floor(share / 1.25) <= loads(after)["new@host"] <= ceil(share)


@with_many_shards
@given(shards=many_shards, holders=holder_lists(least=2, zones="a"), size=st.sampled_from([1, 2, 8]))
def test_when_a_node_joins_little_more_moves_than_its_share(shards, holders, size) -> None:
    joined = [*holders, Holder("new@host", size, "a")]
    before = place(shards, holders, 2)
    share = shares_of(joined, len(shards), 2)["new@host"]
    assert loaded(before, place(shards, joined, 2, before)).total() <= 1.1 * share


@with_many_shards
@given(shards=many_shards, holders=st.one_of(alike(2), alike(1, 4, zones=2)))
def test_when_a_node_joins_its_like_nothing_moves_between_the_others(shards, holders) -> None:
    before = place(shards, holders, 2)
    after = place(shards, [*holders, Holder("new@host", 2.0, "z0")], 2, before)
    assert set(loaded(before, after)) == {"new@host"}


@with_many_shards
@given(shards=many_shards, holders=alike(2, 6))
def test_a_node_that_joins_is_given_primaries_too(shards, holders) -> None:
    joined = [*holders, Holder("new@host", 2.0, "z0")]
    after = place(shards, joined, 2, place(shards, holders, 2))
    assert primaries(after)["new@host"] >= floor(loads(after)["new@host"] / 2 / 1.25)


def test_a_first_zone_beside_another_is_given_a_copy_of_every_shard() -> None:
    shards = shards_of(20)
    before = place(shards, [Holder("a1", 1, "a"), Holder("a2", 1, "a")], 2)
    after = place(shards, [Holder("a1", 1, "a"), Holder("a2", 1, "a"), Holder("b1", 1, "b")], 2, before)
    assert loaded(before, after) == {"b1": 20}


def test_fewer_replicas_than_before_leave_the_primaries_where_they_are() -> None:
    shards, holders = shards_of(12), [Holder(f"n{number}", 1) for number in range(4)]
    before = place(shards, holders, 3)
    after = place(shards, holders, 1, before)
    assert {shard: ids[:1] for shard, ids in before.items()} == after


@pytest.mark.parametrize("capacity", [0, -1, nan, inf])
def test_a_capacity_is_a_finite_number_above_zero(capacity: float) -> None:
    with pytest.raises(ValueError, match="holder 'n0'"):
        Holder("n0", capacity)


def test_a_plan_without_replicas_or_with_a_node_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="0 replicas"):
        place(shards_of(1), [Holder("n0", 1)], 0)
    with pytest.raises(ValueError, match="each id once"):
        place(shards_of(1), [Holder("n0", 1), Holder("n0", 2)], 1)


def test_a_shard_reads_as_collection_and_number() -> None:
    assert str(Shard("papers", 3)) == "papers/3"


@in_its_own_time
@given(
    holders=holder_lists(most=12, sizes=(0.001, 1, 1.5, 2, 8, 1000)),
    shards=st.integers(1, 300),
    replicas=st.integers(1, 5),
)
def test_shares_follow_capacity_as_far_as_zones_leave_a_choice(holders, shards, replicas) -> None:
    count = min(replicas, len(holders))
    shares = shares_of(holders, shards, replicas)
    zones = {zone: sum(shares[each.node_id] for each in holders if each.zone == zone) for zone in "abcd"}
    zones = {zone: share for zone, share in zones.items() if share}
    assert sum(zones.values()) == pytest.approx(shards * count)
    # By capacity, but for nodes that have everything and for zones that have what they may or must have.
    free = {
        round(shares[each.node_id] / each.capacity, 6)
        for each in holders
        if shares[each.node_id] < shards - EPSILON and abs(zones[each.zone] - shards) > EPSILON
    }
    assert len(free) <= 1
    for zone_share in zones.values():
        assert zone_share <= shards + EPSILON or count > len(zones)
        assert zone_share >= shards - EPSILON or count < len(zones)


@in_its_own_time
@given(shards=shard_lists, data=st.data())
def test_who_loads_and_drops_what_a_difference_names_comes_to_the_new_plan(shards, data) -> None:
    before, after = data.draw(any_plans(shards)), data.draw(any_plans(shards))
    state = {shard: set(before.get(shard, ())) for shard in shards}
    for move in moves(before, after):
        assert move.loads or move.drops
        assert state[move.shard].isdisjoint(move.loads)
        assert state[move.shard].issuperset(move.drops)
        state[move.shard] = state[move.shard].union(move.loads).difference(move.drops)
    assert state == {shard: set(after.get(shard, ())) for shard in shards}


def test_a_change_of_the_primary_alone_is_no_move() -> None:
    papers, mail = Shard("papers", 0), Shard("mail", 0)
    assert moves({papers: ("a", "b"), mail: ("a",)}, {papers: ("b", "a"), mail: ("b",)}) == [Move(mail, ("b",), ("a",))]


@st.composite
def searches(draw: st.DrawFn) -> tuple[Assignment, list[Shard], dict[str, float]]:
    shards = draw(shard_lists)
    ids = [f"n{number}@host" for number in range(8)]
    held = st.lists(st.sampled_from(ids), max_size=3, unique=True).map(tuple)
    plan = {shard: draw(held) for shard in shards if draw(st.integers(0, 9))}
    return plan, shards, draw(st.dictionaries(st.sampled_from(ids), st.integers(0, 3).map(float)))


@in_its_own_time
@given(searches())
def test_each_shard_is_asked_of_one_node_that_holds_it_or_named_as_missing(search) -> None:
    plan, shards, load = search
    jobs, missing = cover(plan, shards, load)
    assert sorted([shard for asked in jobs.values() for shard in asked] + missing) == sorted(shards)
    assert all(node_id in plan[shard] for node_id, asked in jobs.items() for shard in asked)
    assert missing == sorted(shard for shard in shards if not plan.get(shard))


@in_its_own_time
@given(searches())
def test_no_node_is_asked_whom_the_others_can_spare(search) -> None:
    plan, shards, load = search
    jobs, missing = cover(plan, shards, load)
    for spared in jobs:
        others = jobs.keys() - {spared}
        assert any(others.isdisjoint(plan[shard]) for shard in shards if shard not in missing)


@in_its_own_time
@given(searches())
def test_of_the_nodes_asked_the_least_loaded_that_holds_it_gets_a_shard(search) -> None:
    plan, shards, load = search
    jobs, _ = cover(plan, shards, load)
    for node_id, asked in jobs.items():
        for shard in asked:
            assert load.get(node_id, 0) == min(load.get(each, 0) for each in plan[shard] if each in jobs)


@in_its_own_time
@given(searches(), st.randoms())
def test_whom_a_search_asks_does_not_depend_on_order(search, order: Random) -> None:
    plan, shards, load = search
    shuffled = {shard: tuple(order.sample(ids, len(ids))) for shard, ids in order.sample(list(plan.items()), len(plan))}
    assert cover(shuffled, order.sample(shards, len(shards)), load) == cover(plan, shards, load)


def test_a_node_that_holds_all_shards_is_asked_for_all_of_them() -> None:
    shards = shards_of(6)
    plan = {shard: (f"n{shard.number}", "big") for shard in shards}
    assert cover(plan, shards, {"big": 2.0}) == ({"big": sorted(shards)}, [])


def test_of_nodes_that_hold_equally_much_the_least_loaded_is_asked() -> None:
    shards = shards_of(4)
    plan = dict.fromkeys(shards, ("a", "b", "c"))
    assert cover(plan, shards, {"a": 2, "b": 1, "c": 3}) == ({"b": sorted(shards)}, [])


def test_a_search_over_a_plan_asks_fewer_nodes_than_there_are_primaries() -> None:
    shards, holders = shards_of(40), [Holder(f"n{number}", 1) for number in range(8)]
    plan = place(shards, holders, 3)
    jobs, missing = cover(plan, shards, {})
    assert not missing
    assert len(jobs) < len(primaries(plan)) == 8
