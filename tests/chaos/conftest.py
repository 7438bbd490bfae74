"""The fixtures of the scenarios; levels and seeds are options of the run (``levels.py``)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forks import Forks
from tests.chaos.harness import Chaos, chaos_on
from tests.chaos.levels import LEVELS, RECOVERY, at_level, is_left_out
from tests.chaos.nodes import Kill
from workers.redis_server import RedisServer

SCENARIO_S = 400
ByLevel = Callable[..., Any]
Report = Callable[[Chaos, Collection[Kill]], list[tuple[float, float]]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the scenarios of higher levels, and give the others time: nodes that start share the machine.

    Tests with most time come first: a run is as long as what begins last.
    """
    for item in items:
        if item.get_closest_marker("chaos") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SCENARIO_S))
    left_out = [item for item in items if is_left_out(item, config.option.chaos)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if config.option.chaos == LEVELS[-1]:
        items.sort(key=_given_s, reverse=True)
    else:
        items[:] = _dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _dealt(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Let each of the processes begin with what is long: ``--dist worksteal`` gives them even parts of the list."""
    long = sorted(filter(_given_s, items), key=_given_s, reverse=True)
    others = iter([item for item in items if not _given_s(item)])
    dealt, left = list[pytest.Item](), len(items)
    for number in range(processes):
        size = left // (processes - number)
        left -= size
        first = long[number::processes]
        dealt += [*first, *islice(others, max(size - len(first), 0))]
    return [*dealt, *others]


def _given_s(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark else 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Say with each failure how to have it again."""
    report: Any = yield
    if report.failed:
        option = item.config.option
        command = f"python -m pytest '{item.nodeid}' --chaos {option.chaos} --chaos-seed {option.chaos_seed}"
        report.sections.append(("to have this again", command))
    return report


@pytest.fixture
def by_level(pytestconfig: pytest.Config) -> ByLevel:
    """Choose a length: ``by_level(core=5, full=100)`` is 5 at the levels core and short."""
    return lambda **values: at_level(pytestconfig.option.chaos, values)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The random choices of this scenario, which only the seed of the run and its own name decide."""
    return random.Random(f"{request.config.option.chaos_seed} {request.node.nodeid}")


@pytest.fixture
def chaos(redis_server: RedisServer, tmp_path: Path, rng: random.Random) -> Iterator[Chaos]:
    """A scenario on an empty Redis."""
    with chaos_on(redis_server.url, tmp_path, rng) as made:
        yield made


@pytest.fixture
def report_recovery(record_property: Callable[[str, object], None]) -> Report:
    """Report the recoveries of a scenario, for the summary at the end of the run; return them."""

    def report(chaos: Chaos, kills: Collection[Kill]) -> list[tuple[float, float]]:
        times = chaos.checker.recovery(kills)
        record_property(RECOVERY, times)
        return times

    return report


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    """Celery's command line in processes that start at once."""
    with Forks(tmp_path) as made:
        yield made
