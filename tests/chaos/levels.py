"""How much of the suite runs, and from which seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

LEVELS = ("core", "short", "full")
VARIANTS = {"threads", "solo", "consul", "etcd"}
"""Pools and registries that are not the default: at the least level, what is run with several is run with that one."""
RECOVERY = "chaos recovery"
"""Name of the property under which a scenario reports how long the failovers took."""
REMARK = "chaos remark"
"""Name of the property under which a scenario reports what else it measured."""

T = TypeVar("T")


def add_options(parser: pytest.Parser) -> None:
    """Add the options of the suite to pytest's."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos", choices=LEVELS, default="core", help="how much of the chaos suite runs (default: core)")
    group.addoption("--chaos-seed", type=int, help="what its random choices are drawn from (default: at random)")


def configure(config: pytest.Config) -> None:
    """Choose the seed, once for all processes of a run."""
    config.addinivalue_line("markers", "chaos(level): a scenario of the chaos suite, and the least level that runs it")
    config.addinivalue_line("markers", "slow: no scenario, and left out at the least level")
    config.addinivalue_line("markers", "timed: it measures times or fills the machine: nothing may run beside it")
    if config.option.chaos_seed is None:
        config.option.chaos_seed = random.SystemRandom().randrange(10**9)


def header(config: pytest.Config) -> str:
    """What a run says of itself at its start."""
    return f"chaos: level {config.option.chaos}, --chaos-seed {config.option.chaos_seed}"


def is_left_out(item: pytest.Item, level: str) -> bool:
    """Whether a test is of a level above ``level``."""
    mark = item.get_closest_marker("chaos")
    is_slow = item.get_closest_marker("slow") is not None or _is_variant(item)
    least = mark.args[0] if mark else LEVELS[is_slow]
    return LEVELS.index(least) > LEVELS.index(level)


def _is_variant(item: pytest.Item) -> bool:
    """Whether a test is also run with what the product uses by default."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and not VARIANTS.isdisjoint(callspec.id.split("-"))


def at_level(level: str, values: dict[str, T]) -> T:
    """Return the value given for a level, else that of the next lower one that was given."""
    return [values[name] for name in LEVELS[: LEVELS.index(level) + 1] if name in values][-1]


def tell_recoveries(reporter: pytest.TerminalReporter) -> None:
    """Print what the scenarios of the run reported of their failovers."""
    for name, remark in _reported(reporter, REMARK):
        reporter.line(f"{name}: {remark}")
    told = _reported(reporter, RECOVERY)
    if not told:
        return
    reporter.section("failovers, in seconds after the kill")
    everything = [time for _, times in told for time in times]
    for name, times in [*told, ("all", everything)]:
        if times:
            reporter.line(f"{name}: {summary(times)}")


def _reported(reporter: pytest.TerminalReporter, wanted: str) -> list[tuple[str, Any]]:
    reports = [report for kind in ("passed", "failed") for report in reporter.stats.get(kind, [])]
    return [(report.nodeid, value) for report in reports for name, value in report.user_properties if name == wanted]


def summary(times: Sequence[tuple[float, float]]) -> str:
    """Say how long kills took to be noticed, and the work to be moved."""
    told = [
        f"{what} p50 {percentile(values, 0.5):.2f} p99 {percentile(values, 0.99):.2f} most {max(values):.2f}"
        for what, values in zip(("detected:", "re-owned:"), zip(*times, strict=True), strict=True)
    ]
    return ", ".join([f"{len(times)} kills", *told])


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
