"""How many nodes a machine should run for the jobs that there are. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from cluster_tasks.errors import ConfigurationError

ROOMY = Fraction(3, 4)
"""A node goes only if the others would not be fuller than this: else the next job would call it back."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to do, and who does it, at one moment."""

    at_s: float
    """Of a monotonic clock."""
    nodes: int
    """That work or start; those that leave are none."""
    held: int
    """Jobs that they run or have reserved."""
    waiting: int
    """Jobs that wait and that they could run."""


@dataclass(frozen=True, slots=True)
class Since:
    """What a decision remembers of the looks before, in seconds of their clock. None: not so, or never."""

    too_few: float | None = None
    too_many: float | None = None
    changed: float | None = None


@dataclass(frozen=True, slots=True)
class ScalePolicy:
    """Between which bounds, and how soon."""

    minimum: int
    maximum: int
    slots: int
    """Jobs that a node runs at a time."""
    up_after_s: float = 2.0
    """Jobs must wait for so long before nodes are started: most bursts are over sooner than one is."""
    down_after_s: float = 60.0
    """Fewer nodes must be enough for so long before one goes."""
    cooldown_s: float = 5.0
    """Between two changes: a node that starts takes a while to show what it does for the lists."""

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ConfigurationError(f"expected 1 <= MIN <= MAX, not MIN={self.minimum} and MAX={self.maximum}")


def decide(policy: ScalePolicy, since: Since, look: Look) -> tuple[Since, int]:
    """Return how many nodes there should be, and what to remember until the next look.

    More, at once as many as all jobs would fill, when jobs have waited for ``up_after_s``. Fewer, one at a time, when
    for ``down_after_s`` nothing has waited and the others would have had room. Never two changes within ``cooldown_s``.
    """
    full = ceil(Fraction(look.held + look.waiting, policy.slots))
    roomy = ceil(look.held / (policy.slots * ROOMY))
    too_few = look.waiting > 0 and look.nodes < min(full, policy.maximum)
    too_many = look.waiting == 0 and look.nodes > max(roomy, policy.minimum)
    since = replace(
        since,
        too_few=(look.at_s if since.too_few is None else since.too_few) if too_few else None,
        too_many=(look.at_s if since.too_many is None else since.too_many) if too_many else None,
    )
    if since.changed is not None and look.at_s - since.changed < policy.cooldown_s:
        return since, look.nodes
    if since.too_few is not None and look.at_s - since.too_few >= policy.up_after_s:
        return Since(changed=look.at_s), min(full, policy.maximum)
    if since.too_many is not None and look.at_s - since.too_many >= policy.down_after_s:
        return replace(since, changed=look.at_s), look.nodes - 1
    return since, look.nodes
