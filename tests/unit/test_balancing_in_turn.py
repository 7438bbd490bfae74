"""The strategies that serve nodes in turn: round robin and weighted."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.balancing import RoundRobin, Weighted
from cluster_tasks.model import Capacity, Load, Node, Request

LLM = Request("llm")
id_sets = st.sets(st.sampled_from("abcdefgh"), min_size=1)
weight_lists = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def nodes_of(ids: str) -> tuple[Node, ...]:
    return tuple(Node(id=node_id) for node_id in ids)


def weighted_nodes(**weights: float) -> tuple[Node, ...]:
    return tuple(Node(id=node_id, metadata={"weight": str(weight)}) for node_id, weight in weights.items())


def serve(balancer: RoundRobin | Weighted, nodes: tuple[Node, ...], times: int, request: Request = LLM) -> str:
    return "".join(balancer.select(request, nodes).id for _ in range(times))


@given(ids=id_sets, cycles=st.integers(1, 3), order=st.randoms())
def test_round_robin_serves_everybody_once_per_cycle_in_the_order_of_ids(ids, cycles, order) -> None:
    shuffled = list(ids)
    order.shuffle(shuffled)
    assert serve(RoundRobin(), nodes_of("".join(shuffled)), len(ids) * cycles) == "".join(sorted(ids)) * cycles


@given(memberships=st.lists(id_sets, min_size=2, max_size=8), times=st.integers(1, 5))
def test_round_robin_goes_on_with_the_next_id_whoever_comes_or_goes(memberships, times) -> None:
    balancer, last = RoundRobin(), ""
    for ids in memberships:
        nodes = nodes_of("".join(ids))
        balancer.update(nodes)
        for _ in range(times):
            following = min((node_id for node_id in ids if node_id > last), default=min(ids))
            last = balancer.select(LLM, nodes).id
            assert last == following


def test_round_robin_keeps_its_turn_through_a_fresh_snapshot_of_the_same_nodes() -> None:
    balancer = RoundRobin()
    assert [serve(balancer, nodes_of("abc"), 2) for _ in range(3)] == ["ab", "ca", "bc"]


def test_the_types_take_turns_of_their_own() -> None:
    # In one common turn every llm job would go to a: each job of the other type sends the turn back to c.
    for balancer in (RoundRobin(), Weighted()):
        everybody, only_c = nodes_of("abc"), nodes_of("c")
        served = ""
        for _ in range(6):
            served += serve(balancer, everybody, 1)
            serve(balancer, only_c, 1, Request("retrieval"))
        assert served == "abcabc"


@given(weights=weight_lists, cycles=st.integers(1, 3))
def test_weighted_keeps_whole_ratios_exactly_over_every_cycle(weights, cycles) -> None:
    nodes, balancer = weighted_nodes(**{f"n{place}": weight for place, weight in enumerate(weights)}), Weighted()
    for _ in range(cycles):
        served = Counter(balancer.select(LLM, nodes).id for _ in range(sum(weights)))
        assert served == {f"n{place}": weight for place, weight in enumerate(weights)}


def test_weighted_spreads_the_turns_of_a_heavy_node() -> None:
    assert serve(Weighted(), weighted_nodes(a=5, b=1, c=1), 14) == "aabacaa" * 2


def test_a_weight_may_be_a_fraction() -> None:
    assert Counter(serve(Weighted(), weighted_nodes(a=0.5, b=1.5), 40)) == {"a": 10, "b": 30}


def test_weighted_keeps_the_credit_of_nodes_that_stay() -> None:
    balancer = Weighted()
    assert serve(balancer, weighted_nodes(a=5, b=1, c=1), 2) == "aa"
    # A fresh start would serve a.
    assert serve(balancer, weighted_nodes(a=5, c=1), 1) == "c"


@given(weights=weight_lists, split=st.integers(0, 20))
def test_weighted_goes_on_through_a_fresh_snapshot_of_the_same_nodes(weights, split) -> None:
    names = {f"n{place}": weight for place, weight in enumerate(weights)}
    whole, parted = Weighted(), Weighted()
    assert serve(whole, weighted_nodes(**names), split + 20) == (
        serve(parted, weighted_nodes(**names), split) + serve(parted, tuple(reversed(weighted_nodes(**names))), 20)
    )


def test_without_a_weight_the_capacity_counts_and_is_at_least_one() -> None:
    nodes = (Node(id="a", capacity=Capacity(max_connections=4)), Node(id="b", capacity=Capacity(max_connections=0)))
    assert Counter(serve(Weighted(), nodes, 10)) == {"a": 8, "b": 2}


@pytest.mark.parametrize("weight", ["", "heavy", "0", "-1", "nan", "inf", "1,5"])
def test_a_weight_that_is_no_positive_number_is_logged_once_and_does_not_count(weight: str, caplog) -> None:
    balancer = Weighted()

    def fresh_view(queue_length: int) -> tuple[Node, ...]:
        load, capacity = Load(queue_length=queue_length), Capacity(max_connections=3)
        return (Node(id="a", metadata={"weight": weight}, capacity=capacity, load=load), Node(id="b"))

    with caplog.at_level(logging.WARNING):
        served = "".join(serve(balancer, fresh_view(turn), 4) for turn in range(3))
    assert Counter(served) == {"a": 9, "b": 3}
    assert [record.getMessage() for record in caplog.records] == [
        f"weight {weight!r} of node a is not a positive number; its max_connections, 3, counts instead"
    ]
