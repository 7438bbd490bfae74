"""Adaptive: scores, history, and the ramp of new nodes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.balancing import Adaptive
from cluster_tasks.balancing.adaptive import LEARNING_RATE, RAMP_UP_FLOOR, TRUST, TRUST_HALF_LIFE_S
from cluster_tasks.clock import ManualClock
from cluster_tasks.model import Capacity, Load, Node, Request

LLM = Request("llm")
IDLE, HALF_BUSY, BUSY = (Node(id=f"cpu{cpu}", load=Load(cpu_usage_percent=cpu)) for cpu in (0, 50, 100))


def adaptive(clock: ManualClock | None = None, seed: int = 1, ramp_up_s: float = 10.0) -> Adaptive:
    return Adaptive(clock or ManualClock(), random.Random(seed), ramp_up_s)


def served(balancer: Adaptive, nodes: tuple[Node, ...], times: int) -> Counter[str]:
    """How often each node is chosen, its load being the same each time."""
    chosen: Counter[str] = Counter()
    for _ in range(times):
        balancer.update(nodes)
        chosen[balancer.select(LLM, nodes).id] += 1
    return chosen


@given(
    cpu=st.floats(0, 300),
    memory_mb=st.floats(0, 3000),
    max_memory_mb=st.integers(0, 2000),
    held=st.integers(0, 8),
    listed=st.integers(0, 8),
    max_connections=st.integers(0, 8),
    success_rate=st.floats(0, 1),
    sent=st.integers(0, 5),
)
def test_the_score_is_the_formula(
    cpu, memory_mb, max_memory_mb, held, listed, max_connections, success_rate, sent
) -> None:
    node = Node(
        id="n",
        capacity=Capacity(max_connections=max_connections, max_memory_mb=max_memory_mb),
        load=Load(
            current_connections=held,
            queue_length=listed,
            memory_usage_mb=memory_mb,
            cpu_usage_percent=cpu,
            success_rate=success_rate,
        ),
    )
    balancer = adaptive()
    for _ in range(sent):
        balancer.select(LLM, (node,))
    memory = min(1, memory_mb / max_memory_mb) if max_memory_mb else 0
    connections = min(1, (held + listed + sent) / max(1, max_connections))
    expected = 0.3 * min(1, cpu / 100) + 0.2 * memory + 0.3 * connections + 0.2 * (1 - success_rate)
    assert balancer.score(node) == pytest.approx(expected)
    assert 0 <= balancer.score(node) <= 1 + 1e-9


@given(seed=st.integers(0, 1000))
def test_the_better_of_two_wins(seed) -> None:
    assert adaptive(seed=seed).select(LLM, (BUSY, IDLE)) is IDLE
    assert adaptive(seed=seed).select(LLM, (IDLE, BUSY)) is IDLE


def test_of_many_nodes_the_worst_never_wins_and_the_best_not_always() -> None:
    chosen = served(adaptive(), (IDLE, HALF_BUSY, BUSY), 300)
    # Of the three pairs, two have the idle node in them.
    assert set(chosen) == {IDLE.id, HALF_BUSY.id}
    assert chosen[IDLE.id] == pytest.approx(200, abs=30)


def test_what_is_sent_counts_until_the_next_update() -> None:
    balancer, nodes = adaptive(), (Node(id="a"), Node(id="b"))
    first, second = (balancer.select(LLM, nodes) for _ in range(2))
    assert {first.id, second.id} == {"a", "b"}
    assert balancer.score(first) == pytest.approx(0.3)
    balancer.update(nodes)
    assert balancer.score(first) == 0


@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=20), reported=st.floats(0, 1))
def test_history_mixes_what_is_reported_with_an_average_of_the_recorded_outcomes(outcomes, reported) -> None:
    balancer, node, average = adaptive(), Node(id="n", load=Load(success_rate=reported)), 1.0
    for success in outcomes:
        balancer.record("n", success, latency_s=0.1)
        average = (1 - LEARNING_RATE) * average + LEARNING_RATE * success
    assert balancer.success_rate(node) == pytest.approx((1 - TRUST) * reported + TRUST * average)
    assert balancer.score(node) == pytest.approx(0.2 * (1 - balancer.success_rate(node)))


def test_what_was_learned_fades_so_that_nobody_is_shunned_for_ever() -> None:
    clock = ManualClock()
    balancer, node = adaptive(clock), Node(id="n")
    for _ in range(50):
        balancer.record("n", False, latency_s=0.1)
    fresh = 1 - balancer.success_rate(node)
    clock.advance(TRUST_HALF_LIFE_S)
    assert 1 - balancer.success_rate(node) == pytest.approx(fresh / 2)
    clock.advance(20 * TRUST_HALF_LIFE_S)
    assert balancer.success_rate(node) == pytest.approx(1, abs=1e-5)


def test_a_node_that_fails_is_avoided_and_one_that_left_is_forgotten() -> None:
    balancer, nodes = adaptive(), (Node(id="failing"), Node(id="sound"))
    balancer.record("failing", False, latency_s=0.1)
    assert set(served(balancer, nodes, 50)) == {"sound"}
    balancer.update(nodes[1:])
    balancer.update(nodes)
    assert balancer.score(nodes[0]) == 0


def test_nodes_of_the_first_update_are_not_new() -> None:
    balancer = adaptive()
    assert balancer.readiness(IDLE) == 1
    balancer.update((IDLE, BUSY))
    assert balancer.readiness(IDLE) == 1
    assert set(served(balancer, (IDLE, BUSY), 50)) == {IDLE.id}


def test_a_new_node_becomes_ready_linearly() -> None:
    clock = ManualClock()
    balancer = adaptive(clock, ramp_up_s=10)
    balancer.update((BUSY,))
    clock.advance(100)
    readiness = []
    for _ in range(6):
        balancer.update((BUSY, IDLE))
        readiness.append(balancer.readiness(IDLE))
        clock.advance(2.5)
    quarter = (1 - RAMP_UP_FLOOR) / 4
    assert readiness == pytest.approx([RAMP_UP_FLOOR + quarter * step for step in range(4)] + [1, 1])


@pytest.mark.parametrize("age_s", [0, 2.5, 5, 7.5, 10])
def test_a_new_node_gets_the_jobs_it_would_win_as_far_as_it_is_ready(age_s: float) -> None:
    clock = ManualClock()
    balancer = adaptive(clock)
    balancer.update((BUSY,))
    balancer.update((BUSY, IDLE))
    clock.advance(age_s)
    share = served(balancer, (BUSY, IDLE), 2000)[IDLE.id] / 2000
    assert share == pytest.approx(balancer.readiness(IDLE), abs=0.03)


def test_between_two_new_nodes_the_score_decides() -> None:
    balancer = adaptive()
    balancer.update(())
    balancer.update((BUSY, IDLE))
    assert set(served(balancer, (BUSY, IDLE), 200)) == {IDLE.id}


def test_a_new_node_alone_gets_everything() -> None:
    balancer = adaptive()
    balancer.update((BUSY,))
    assert served(balancer, (IDLE,), 50) == {IDLE.id: 50}


def test_a_node_that_returns_with_a_new_epoch_is_new() -> None:
    clock, before, after = ManualClock(), Node(id="n", epoch="1-a"), Node(id="n", epoch="2-b")
    balancer = adaptive(clock)
    balancer.update((before,))
    balancer.update((after,))
    assert [balancer.readiness(before), balancer.readiness(after)] == [1, RAMP_UP_FLOOR]


def test_without_a_ramp_a_new_node_is_ready_at_once() -> None:
    balancer = adaptive(ramp_up_s=0)
    balancer.update(())
    balancer.update((IDLE,))
    assert balancer.readiness(IDLE) == 1
