"""How many nodes there should be: bounds, patience, and no flapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.keys import Keys
from cluster_tasks.model import Node
from workers.autoscale import jobs_for
from workers.scaling import Look, ScalePolicy, Since, decide
from workers.up import up

POLICY = ScalePolicy(minimum=1, maximum=4, slots=2, up_after_s=2, down_after_s=60, cooldown_s=5)


def targets(policy: ScalePolicy, looks: Sequence[Look]) -> list[int]:
    since, told = Since(), []
    for look in looks:
        since, target = decide(policy, since, look)
        told.append(target)
    return told


def follow(policy: ScalePolicy, jobs: Sequence[int], nodes: int) -> Iterator[int]:
    """Yield how many nodes there are, a second each, if all are there at once and share so many jobs."""
    since = Since()
    for second, number in enumerate(jobs):
        held = min(number, nodes * policy.slots)
        since, nodes = decide(policy, since, Look(float(second), nodes, held, number - held))
        yield nodes


policies = st.builds(
    lambda least, more, slots, up, down, cool: ScalePolicy(least, least + more, slots, up, down, cool),
    st.integers(1, 3), st.integers(0, 6), st.integers(1, 8), st.floats(0, 10), st.floats(0, 120), st.floats(0, 30),
)  # fmt: skip


# The rule


def test_nodes_are_started_for_all_that_waits_when_it_has_waited_for_a_while() -> None:
    looks = [Look(at, nodes=1, held=2, waiting=4) for at in (0.0, 1.0, 1.9, 2.0)]
    assert targets(POLICY, looks) == [1, 1, 1, 3]
    assert targets(POLICY, [Look(at, 1, 2, 400) for at in (0.0, 2.0)]) == [1, 4]


def test_a_burst_that_is_over_sooner_starts_nothing() -> None:
    looks = [Look(at, 1, 2, waiting) for at, waiting in ((0.0, 9), (1.5, 0), (2.5, 9), (4.0, 9), (4.5, 9))]
    assert targets(POLICY, looks) == [1, 1, 1, 1, 4]


def test_a_node_goes_when_fewer_were_enough_for_long_and_then_the_next() -> None:
    jobs = [0] * 90
    assert list(follow(POLICY, jobs, nodes=3)) == [3] * 60 + [2] * 5 + [1] * 25


def test_a_pause_between_jobs_sends_nobody_away() -> None:
    jobs = [6, *[0] * 59] * 5
    assert set(follow(POLICY, jobs, nodes=3)) == {3}


def test_nodes_stay_that_are_nearly_full_without_the_one_that_would_go() -> None:
    assert set(follow(POLICY, [4] * 300, nodes=3)) == {3}, "two nodes would have no slot left"
    assert list(follow(POLICY, [3] * 300, nodes=3))[-1] == 2


def test_bounds_that_cannot_be_are_refused_with_their_values() -> None:
    for least, most in ((0, 3), (4, 2)):
        with pytest.raises(ConfigurationError, match=f"MIN={least} and MAX={most}"):
            ScalePolicy(least, most, 1)


# Whatever happens


@given(policies, st.data())
def test_no_decision_leaves_the_bounds_or_comes_too_soon_or_takes_what_is_needed(
    policy: ScalePolicy, data: st.DataObject
) -> None:
    since, at_s, nodes, changes = Since(), 0.0, policy.minimum, []
    for _ in range(data.draw(st.integers(1, 40))):
        at_s += data.draw(st.floats(0.1, 40))
        look = Look(at_s, nodes, data.draw(st.integers(0, nodes * policy.slots)), data.draw(st.integers(0, 50)))
        since, target = decide(policy, since, look)
        assert policy.minimum <= target <= policy.maximum
        if target < nodes:
            assert (look.waiting, target) == (0, nodes - 1)
            assert look.held < target * policy.slots
        if target > nodes:
            assert look.waiting > 0
            assert target <= ceil((look.held + look.waiting) / policy.slots)
        if target != nodes:
            changes.append(at_s)
        nodes = target
    assert all(later - earlier >= policy.cooldown_s for earlier, later in pairwise(changes))


@given(policies, st.integers(0, 60), st.data())
def test_under_a_load_that_stays_the_number_of_nodes_settles_and_never_turns_back(
    policy: ScalePolicy, jobs: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(policy.minimum, policy.maximum))
    long = ceil(policy.up_after_s + policy.down_after_s + (policy.cooldown_s + 1) * policy.maximum) + 2
    seen = [start, *follow(policy, [jobs] * long, start)]
    assert seen in (sorted(seen), sorted(seen, reverse=True))
    assert seen[-1] == policy.maximum or jobs <= seen[-1] * policy.slots, "nothing waits that a node could be had for"
    if not jobs:
        assert seen[-1] == policy.minimum


# What counts as waiting


def test_only_jobs_that_such_nodes_could_take_are_a_reason_to_start_one() -> None:
    keys = Keys("cluster")
    ours = Node(id="node1@host", serves=frozenset({"llm", "embedding"}))
    others = [Node(id="gpu@host", serves=frozenset({"llm"})), Node(id="ocr@host", serves=frozenset({"llm", "ocr"}))]
    could = {"node.node1@host": 1, "node.gpu@host": 2, "waiting.embedding": 4, "waiting.any": 8, "suspect.llm": 16}
    could_not = {"node.node1@host.bound": 32, "node.ocr@host": 64, "waiting.ocr": 128}
    assert jobs_for([ours], [ours, *others], could | could_not, keys) == 31


# The option


@pytest.mark.parametrize("value", ["4", "4,1", "0,3", "1,x", "1,2,3", ""])
def test_a_range_that_is_none_is_refused_with_what_it_should_be(value: str) -> None:
    with pytest.raises(click.BadParameter, match=f"MIN,MAX such as 1,4 .* not '{value}'"):
        up.make_context("up", ["--autoscale", value])
    assert up.make_context("up", ["--autoscale", "1,4"]).params["autoscale"] == (1, 4)


def test_a_range_and_a_number_are_not_both_taken() -> None:
    with pytest.raises(click.UsageError, match="leave --nodes out"):
        up.main(["--autoscale", "1,4", "--nodes", "3"], standalone_mode=False)
