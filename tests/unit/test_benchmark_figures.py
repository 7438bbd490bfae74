"""The arithmetic of the benchmarks: a figure that is wrong is believed for long."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.figures import Warm, Zipf, arrivals, exponent, in_turn, line, percentile


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    random.Random(1).shuffle(values)
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0, 0.0)] == [50, 99, 100, 1]
    assert percentile([3.0], 0.99) == 3
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_has_the_exponent_of_its_law(power: float) -> None:
    sizes = [100, 300, 1_000, 10_000]
    assert exponent(sizes, [0.7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_a_straight_line_on_a_base_does_not_grow_with_the_square_and_a_square_beside_it_shows() -> None:
    sizes = [100, 1_000, 10_000]
    assert exponent(sizes, [50 + size for size in sizes]) < 1.1
    assert exponent(sizes, [size + size**2 / 100 for size in sizes]) > 1.5
    assert exponent(sizes, [0, 0, 0]) == 0
    with pytest.raises(ValueError, match="two different sizes"):
        exponent([10, 10], [1, 2])


def test_a_line_goes_through_what_it_is_given_and_promises_nothing_below_zero() -> None:
    assert line([20, 40], [50, 90]) == pytest.approx((10, 2))
    assert line([20, 40], [32, 32]) == pytest.approx((32, 0))
    assert line([20, 40], [40, 30]) == pytest.approx((35, 0))
    base, slope = line([20, 40], [10, 50])
    assert base == 0
    assert 0.5 < slope < 1.25
    with pytest.raises(ValueError, match="two different sizes"):
        line([20], [1])


def test_arrivals_come_as_often_as_they_should_and_not_in_step() -> None:
    at = list(arrivals(random.Random(1), per_s=50, lasts_s=100))
    assert len(at) == pytest.approx(5_000, rel=0.05)
    assert at == sorted(at)
    assert at[-1] < 100
    gaps = [later - sooner for sooner, later in pairwise(at)]
    assert percentile(gaps, 0.5) == pytest.approx(0.0139, rel=0.1)


def test_every_second_round_is_in_the_other_direction() -> None:
    assert [in_turn("abc", number) for number in range(3)] == [[*"abc"], [*"cba"], [*"abc"]]


def test_few_keys_are_asked_for_often() -> None:
    zipf, rng = Zipf(100, 1.0), random.Random(1)
    drawn = Counter(zipf.draw(rng) for _ in range(20_000))
    assert set(drawn) <= set(range(100))
    assert drawn[0] / drawn[9] == pytest.approx(10, rel=0.2)


def test_the_key_that_was_not_used_for_longest_is_cold() -> None:
    warm = Warm(2)
    assert [warm.use(key) for key in ("a", "b", "a", "c", "b", "c")] == [False, False, True, False, False, True]
    assert not Warm(0).use("a")
