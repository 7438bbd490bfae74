"""Rankings put together: those of several shards into one, and those of several kinds of search into one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Ranked(Protocol):
    """What was found: higher scores come first, of equals the least id."""

    @property
    def score(self) -> float: ...

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Ranked)


def in_order(found: Iterable[R]) -> list[R]:
    """Return what was found, the best first."""
    return sorted(found, key=lambda each: (-each.score, each.id))


def merge(rankings: Iterable[Iterable[R]], k: int) -> list[R]:
    """Return the ``k`` best of rankings whose scores mean the same, as of several shards."""
    return in_order(each for ranking in rankings for each in ranking)[:k]
