"""How long something has stood still, for an observer that may be held up itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.progress import Stall, Stalls


def test_a_mark_that_moves_or_is_not_there_does_not_stand_still() -> None:
    stall = Stall(2.0)
    assert [stall.look(mark, float(now)) for now, mark in enumerate([1, 2, None, None, 2, 3])] == [0.0] * 6


def test_a_mark_that_stays_stands_still_since_it_was_first_seen() -> None:
    stall = Stall(2.0)
    assert [stall.look(7, float(now)) for now in range(4)] == [0, 1, 2, 3]
    assert stall.look(8, 4.0) == 0
    assert stall.look(8, 5.5) == 1.5


def test_the_gap_of_an_observer_that_was_stopped_counts_as_one_step() -> None:
    stall = Stall(2.0)
    stall.look(7, 0.0)
    assert stall.look(7, 600.0) == 2.0
    assert stall.look(7, 601.0) == 3.0


def test_of_several_the_one_that_is_there_longest_counts() -> None:
    stalls = Stalls(2.0)
    seen = [stalls.look(marks, float(now)) for now, marks in enumerate([{"a"}, {"a", "b"}, {"b", "c"}, {"b"}, set()])]
    assert seen == [0, 1, 1, 2, 0]


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 100)), min_size=1))
def test_it_never_counts_more_than_was_seen_or_than_went_by(looks: list[tuple[int, float]]) -> None:
    stall, now, since = Stall(2.0), 0.0, 0.0
    last, steps = None, 0
    for mark, gap in looks:
        now += gap
        steps = steps + 1 if mark == last else 0
        since = since if mark == last else now
        last = mark
        still = stall.look(mark, now)
        assert 0 <= still <= min(now - since, 2.0 * steps) + 1e-6
