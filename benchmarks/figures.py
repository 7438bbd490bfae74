"""The arithmetic of the benchmarks: percentiles, growth, arrivals and skewed keys. Pure; randomness comes in."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that this share (0 to 1) of all does not exceed. Raises ValueError if there are none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no percentile of no values")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The ``k`` of the ``cost ~ size ** k`` that fits best: least squares of the logarithms. 0 for costs of 0.

    Raises ValueError for fewer than two different sizes.
    """
    points = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
    if len(set(sizes)) < 2:
        raise ValueError("growth shows with two different sizes at least")
    if len({x for x, _ in points}) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The ``a`` and ``b`` of the ``a + b * size`` that fits best, neither below 0. Raises as ``exponent``."""
    if len(set(sizes)) < 2:
        raise ValueError("growth shows with two different sizes at least")
    mean_x, mean_y = sum(sizes) / len(sizes), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in sizes)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, values, strict=True)) / spread
    slope = max(0.0, slope)
    base = mean_y - slope * mean_x
    # What grows from nothing has noise for a base: a line through the origin fits it best then.
    return (
        (base, slope)
        if base >= 0
        else (0.0, sum(x * y for x, y in zip(sizes, values, strict=True)) / sum(x * x for x in sizes))
    )


def arrivals(rng: random.Random, per_s: float, lasts_s: float) -> Iterator[float]:
    """The seconds at which independent requests come, so many in a second on average (a Poisson process)."""
    at_s = rng.expovariate(per_s)
    while at_s < lasts_s:
        yield at_s
        at_s += rng.expovariate(per_s)


def in_turn(names: Iterable[T], round_number: int) -> list[T]:
    """Return them in their order, and in every second round in the other, so that nobody is always the first."""
    return list(names)[:: -1 if round_number % 2 else 1]


class Zipf:
    """Numbers from 0 on, number k with a weight of ``1 / (k + 1) ** skew``: few are asked for often, most seldom."""

    def __init__(self, count: int, skew: float) -> None:
        self._sums = list(accumulate((k + 1) ** -skew for k in range(count)))

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return bisect_left(self._sums, rng.random() * self._sums[-1])


class Warm:
    """What was used last, as a cache of a node holds it: the ``most`` last keys."""

    def __init__(self, most: int) -> None:
        self._most, self._keys = most, OrderedDict[str, None]()

    def use(self, key: str) -> bool:
        """Use a key; return whether it was held. The one not used for longest makes room."""
        held = key in self._keys
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return held
