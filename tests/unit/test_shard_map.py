"""Whom a search asks: nodes that have the shards in memory, as few as can be, those with the least to do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.shards.assignments import Assigned, Whereabouts
from cluster_tasks.shards.shard_map import (
    ANY_NODE,
    ENOUGH_DURATIONS,
    LATE_AT_FIRST_S,
    LATE_AT_LEAST_S,
    LATE_AT_MOST_S,
    divide,
    late_after_s,
    seconds,
)

NODES = "abcde"


def where(*shards: tuple[str, str]) -> Whereabouts:
    """Each shard as the nodes that are to hold it and those that are ready, a letter each."""
    return Whereabouts(Assigned(1, tuple(tuple(held) for held, _ in shards)), tuple(frozenset(r) for _, r in shards))


def loads(**of: float) -> dict[str, float]:
    return of


def test_one_node_that_has_all_is_asked_for_all() -> None:
    found = where(("ab", "ab"), ("ba", "ab"), ("ab", "ab"))
    assert divide("docs", found, loads(a=2, b=1)) == {"b": [0, 1, 2]}
    assert divide("docs", found, loads(a=1, b=2)) == {"a": [0, 1, 2]}


def test_each_node_is_asked_once_for_all_its_shards() -> None:
    found = where(("a", "a"), ("b", "b"), ("a", "a"), ("b", "b"))
    assert divide("docs", found, loads(a=0, b=0)) == {"a": [0, 2], "b": [1, 3]}


def test_a_node_that_still_loads_is_not_asked_while_another_is_ready() -> None:
    found = where(("ab", "b"), ("ab", "b"))
    assert divide("docs", found, loads(a=0, b=9)) == {"b": [0, 1]}


def test_who_was_to_hold_a_shard_before_is_asked_until_the_new_holder_is_ready() -> None:
    assert divide("docs", where(("b", "a")), loads(a=0, b=0)) == {"a": [0]}
    assert divide("docs", where(("b", "ab")), loads(a=5, b=0)) == {"b": [0]}


def test_a_shard_that_nobody_has_ready_is_asked_of_its_holders_and_else_of_anybody() -> None:
    found = where(("a", "a"), ("b", ""), ("c", "c"))
    assert divide("docs", found, loads(a=0, b=0)) == {"a": [0], "b": [1], ANY_NODE: [2]}
    assert divide("docs", found, {}) == {ANY_NODE: [0, 1, 2]}


def test_the_second_node_is_the_one_that_has_most_of_the_shards_in_memory_and_of_equals_the_least_to_do() -> None:
    found = where(("ab", "ab"), ("ac", "ac"), ("ac", "ac"), ("bd", "bd"))
    jobs = {"a": [0, 1, 2], "b": [3]}
    assert seconds(found, jobs, loads(a=0, b=0, c=9, d=0)) == {"a": "c", "b": "d"}
    assert seconds(found, {"a": [0, 1]}, loads(a=0, b=2, c=1)) == {"a": "c"}
    assert seconds(found, {"a": [0, 1]}, loads(a=0, b=1, c=2)) == {"a": "b"}


def test_there_is_no_second_node_where_a_shard_is_in_memory_once_or_on_nodes_that_cannot_be_asked() -> None:
    assert seconds(where(("a", "a"), ("b", "b")), {"a": [0], "b": [1]}, loads(a=0, b=0)) == {}
    assert seconds(where(("ab", "ab")), {"a": [0]}, loads(a=0)) == {}
    assert seconds(where(("ab", "")), {"a": [0]}, loads(a=0, b=0)) == {}
    assert seconds(where(("ab", "ab")), {ANY_NODE: [0]}, loads(a=0, b=0)) == {}


def test_a_part_is_late_when_19_of_20_took_less_within_bounds() -> None:
    spread = [number / 100 for number in range(1, 101)]
    assert late_after_s(spread) == late_after_s(spread[::-1]) == 0.96
    assert late_after_s([0.001] * 95 + [9.0] * 5) == LATE_AT_MOST_S
    assert late_after_s([0.001] * 96 + [9.0] * 4) == LATE_AT_LEAST_S
    assert late_after_s([0.2] * ENOUGH_DURATIONS) == 0.2
    assert late_after_s([0.2] * (ENOUGH_DURATIONS - 1)) == LATE_AT_FIRST_S


@given(
    st.lists(st.tuples(st.text(NODES, max_size=3), st.text(NODES, max_size=3)), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from(NODES), st.floats(0, 10)),
)
def test_every_shard_is_asked_for_once_and_of_a_node_that_may_be_asked(
    shards: list[tuple[str, str]], of: dict[str, float]
) -> None:
    found = where(*shards)
    jobs = divide("docs", found, of)
    assert sorted(number for numbers in jobs.values() for number in numbers) == list(range(len(shards)))
    assert jobs.keys() <= {*of, ANY_NODE}
    for node_id, numbers in jobs.items():
        for number in numbers:
            held, ready = shards[number]
            able = set(ready) & of.keys() or set(held) & of.keys() or {ANY_NODE}
            assert node_id in able
