"""Least connection."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.balancing import LeastConnection
from cluster_tasks.model import Load, Node, Request

LLM = Request("llm")


def nodes_with(*in_flight: int) -> tuple[Node, ...]:
    """Half of the jobs of each node are held, the rest wait in its list."""
    return tuple(
        Node(id=f"n{place}", load=Load(current_connections=count // 2, queue_length=count - count // 2))
        for place, count in enumerate(in_flight)
    )


@given(
    snapshots=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=4),
    times=st.integers(1, 25),
    seed=st.integers(0, 9),
)
def test_nobody_has_fewer_in_flight_than_the_chosen_node(snapshots, times, seed) -> None:
    balancer = LeastConnection(random.Random(seed))
    for counts in snapshots:
        nodes = nodes_with(*counts)
        in_flight = {node.id: node.in_flight for node in nodes}
        balancer.update(nodes)
        for _ in range(times):
            chosen = balancer.select(LLM, nodes).id
            assert in_flight[chosen] == min(in_flight.values())
            in_flight[chosen] += 1


def test_what_is_sent_counts_for_every_type() -> None:
    balancer, nodes = LeastConnection(random.Random(1)), nodes_with(0, 0)
    first = balancer.select(Request("llm"), nodes)
    assert balancer.select(Request("embedding"), tuple(nodes)) is not first


def test_an_update_takes_the_place_of_what_was_sent() -> None:
    balancer = LeastConnection(random.Random(1))
    nodes = nodes_with(0, 5)
    assert [balancer.select(LLM, nodes).id for _ in range(4)] == ["n0"] * 4
    finished = nodes_with(0, 2)
    balancer.update(finished)
    assert [balancer.select(LLM, finished).id for _ in range(2)] == ["n0"] * 2


def test_equals_are_drawn_at_random() -> None:
    nodes, rng = nodes_with(1, 1, 1, 2), random.Random(1)
    # Each time a balancer that has sent nothing, as in as many producers.
    chosen = Counter(LeastConnection(rng).select(LLM, nodes).id for _ in range(600))
    assert set(chosen) == {"n0", "n1", "n2"}
    assert min(chosen.values()) > 150
