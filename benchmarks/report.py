"""What a benchmark says, and how: its options, its rows with ratio and mark, a table for people, JSON for programs.

::

    def measure(options: argparse.Namespace) -> Iterator[Row]:
        ...
        yield Row("prefork", {"stock, jobs/s": 812.0, "cluster, jobs/s": 2501.0}, ratio=3.08, mark=Mark(at_least=3))

    benchmark = Benchmark("throughput", __doc__)
    benchmark.option("--jobs", short=2_000, full=20_000, help="jobs of each turn")
    sys.exit(benchmark.run(measure))

Each benchmark is short by default and long with ``--full``; an option that is given wins over both. A mark that is
missed is a result and no error: the exit code is 0 whenever all was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.stage import alone
from workers.redis_server import find_redis_server

RATIO = "ratio"
PACKAGES = ("cluster-tasks", "celery", "kombu", "redis", "hiredis")
BUSY_PERCENT = 25.0
"""A machine with more than this of its processors in use did other work when the benchmark began."""
LOOK_S = 0.5
IN_USE = "in use at start, %"
SIGNS: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("≥", operator.ge),
    "at_most": ("≤", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}
"""The bounds of a mark: how they are written, and what they ask."""
VERDICTS = {None: "", True: "met", False: "missed"}
STYLES = {"met": "green", "missed": "red"}
UNKNOWN = "not known yet: profile it"
Value = float | int | str


@dataclass(frozen=True, slots=True)
class Mark:
    """What one number of a row has to reach; just one of the bounds is set. Raises ValueError otherwise."""

    of: str = RATIO
    """``ratio``, or the name of a figure."""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in SIGNS) != 1:
            raise ValueError(f"a mark has one of {', '.join(SIGNS)}, not {self!r}")

    def met_by(self, number: float) -> bool:
        """Whether the number reaches it. One that is not a number does not."""
        _, reaches, bound = self._bound
        return reaches(number, bound)

    def __str__(self) -> str:
        sign, _, bound = self._bound
        return f"{sign} {shown(bound)}" if self.of == RATIO else f"{self.of} {sign} {shown(bound)}"

    @property
    def _bound(self) -> tuple[str, Callable[[float, float], bool], float]:
        return next((*SIGNS[name], bound) for name in SIGNS if (bound := getattr(self, name)) is not None)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found about one thing. Raises ValueError if the mark is of something the row does not have."""

    name: str
    figures: Mapping[str, Value]
    """By name and unit: ``p99, µs``. Rows that are to share a column share the name."""
    ratio: float | None = None
    """To what the benchmark compares with, measured in the same run on the same Redis."""
    mark: Mark | None = None
    reason: str = ""
    """Why the mark is missed, as profiling found; shown only if it is."""

    def __post_init__(self) -> None:
        if self.mark is not None and not isinstance(self.marked, int | float):
            raise ValueError(f"{self.name}: the mark is of {self.mark.of!r}, which is {self.marked!r} and no number")

    @property
    def met(self) -> bool | None:
        """Whether the mark is met; None without a mark."""
        return None if self.mark is None else self.mark.met_by(float(self.marked))  # type: ignore[arg-type]

    @property
    def marked(self) -> Value | None:
        """What the mark is of: the ratio, or a figure. There is a mark."""
        assert self.mark is not None
        return self.ratio if self.mark.of == RATIO else self.figures.get(self.mark.of)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of a benchmark found, and where."""

    benchmark: str
    title: str
    profile: str
    """``short`` or ``full``."""
    options: Mapping[str, Any]
    rows: Sequence[Row]
    took_s: float
    date: str
    """When it began, as ISO 8601 says it, in UTC."""
    machine: Mapping[str, Value]
    versions: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def met(self) -> bool:
        """Whether no mark is missed."""
        return all(row.met is not False for row in self.rows)

    @property
    def busy(self) -> bool:
        """Whether the machine did other work when it began: ratios still mean something, times do not."""
        return float(self.machine[IN_USE]) > BUSY_PERCENT

    def as_json(self) -> str:
        """Return it on one line."""
        rows = [asdict(row) | {"met": row.met} for row in self.rows]
        return json.dumps(asdict(self) | {"rows": rows, "met": self.met, "busy": self.busy}, ensure_ascii=False)

    @classmethod
    def of_json(cls, text: str) -> Self:
        """Return what ``as_json`` wrote."""
        told: dict[str, Any] = json.loads(text)
        del told["met"], told["busy"]
        rows = []
        for row in told.pop("rows"):
            del row["met"]
            rows.append(Row(**row | {"mark": Mark(**row["mark"]) if row["mark"] else None}))
        return cls(**told, rows=rows)


class Benchmark:
    """One command: ``python -m benchmarks.NAME [--full] [--json] …``."""

    def __init__(self, name: str, doc: str | None, packages: Sequence[str] = ()) -> None:
        """``packages`` are those that it measures beside ours, whose versions are told."""
        self.name, self._packages = name, packages
        self._title = (doc or name).strip().splitlines()[0].partition(": ``")[0]
        self.parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.parser.add_argument("--full", action="store_true", help="the long run, whose figures are kept")
        self.parser.add_argument("--json", action="store_true", help="one line of JSON and no table")
        self._by_profile: dict[str, tuple[Any, Any]] = {}
        self._notes: list[str] = []

    def option(self, flag: str, *, short: Any, full: Any, help: str = "", **words: Any) -> None:  # noqa: A002 - as argparse calls it
        """Add an option whose default is one in the short profile, and another in the long."""
        words.setdefault("type", type(full))
        told = f"{help} (default: {short}, with --full {full})".strip()
        action = self.parser.add_argument(flag, default=None, help=told, **words)
        self._by_profile[action.dest] = (short, full)

    def note(self, text: str) -> None:
        """Have a line stand under the table: what a figure means, or why one is not there."""
        self._notes.append(text)

    def run(self, measure: Callable[[argparse.Namespace], Iterable[Row]], argv: Sequence[str] | None = None) -> int:
        """Measure and print; return the exit code."""
        options = self.parser.parse_args(argv)
        for name, (short, full) in self._by_profile.items():
            if getattr(options, name) is None:
                setattr(options, name, full if options.full else short)
        alone()
        date, machine, begun_s = datetime.now(UTC).isoformat(timespec="seconds"), machine_now(), time.monotonic()
        rows = list(measure(options))
        result = Result(
            benchmark=self.name,
            title=self._title,
            profile="full" if options.full else "short",
            options={name: value for name, value in vars(options).items() if name not in {"full", "json"}},
            rows=rows,
            took_s=round(time.monotonic() - begun_s, 1),
            date=date,
            machine=machine,
            versions=versions(self._packages),
            notes=self._notes,
        )
        if options.json:
            print(result.as_json())
        else:
            show(result)
        return 0


def machine_now() -> dict[str, Value]:
    """Return what the figures depend on."""
    return {
        "processor": _processor(),
        "processors": os.cpu_count() or 1,
        "memory, GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        # Not the load, which remembers for minutes the benchmark that ran before this one.
        IN_USE: psutil.cpu_percent(LOOK_S),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Return what was measured: packages, Python, the Redis server, and the commit if there is one."""
    found = {"python": platform.python_version()} | {package: version(package) for package in (*PACKAGES, *more)}
    said = subprocess.run([find_redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    found["redis-server"] = next(word.removeprefix("v=") for word in said.split() if word.startswith("v="))
    if git := shutil.which("git"):
        asked = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True)
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip()
    return found


def shown(value: Value | None) -> str:
    """Return a number with as many digits as mean something, and a text as it is."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if abs(value) >= 1000 or (math.isfinite(value) and value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of its table; of what no row has there is no column."""
    columns = list(dict.fromkeys(name for row in result.rows for name in row.figures))
    ratios = any(row.ratio is not None for row in result.rows)
    marks = any(row.mark is not None for row in result.rows)
    heads = ["", *columns, *([RATIO] if ratios else []), *(["mark", ""] if marks else [])]
    rows = []
    for row in result.rows:
        made = [row.name, *(shown(row.figures.get(name)) for name in columns)]
        made += [shown(row.ratio)] if ratios else []
        made += [str(row.mark or ""), VERDICTS[row.met]] if marks else []
        rows.append(made)
    return heads, rows


def table(result: Result) -> Table:
    """Return the table that closes a benchmark."""
    heads, rows = cells(result)
    made = Table(title=result.title, title_justify="left")
    for place, head in enumerate(heads):
        made.add_column(head, justify="left" if place == 0 or place >= len(heads) - 2 else "right")
    for row in rows:
        made.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    return made


def markdown(result: Result) -> str:
    """Return it as ``docs/benchmarks.md`` shows it: the table, why marks are missed, and where it was measured."""
    heads, rows = cells(result)
    lines = ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([f"### {result.benchmark}", "", f"{result.title}.", "", *lines, "", *told(result)])


def told(result: Result) -> list[str]:
    """Return the lines under its table."""
    missed = [f"missed: {row.name}: {row.reason or UNKNOWN}" for row in result.rows if row.met is False]
    where = ", ".join(f"{name} {value}" for name, value in (*result.machine.items(), *result.versions.items()))
    busy = ["The machine did other work: the ratios mean something, the times do not."] if result.busy else []
    return [*missed, *result.notes, f"{result.date}, {result.profile}, {shown(result.took_s)} s; {where}", *busy]


def show(result: Result, console: Console | None = None) -> None:
    """Print it for people: the table, why marks are missed, and where it was measured."""
    # A pipe has no width: what is written to a file is not to be cut.
    out = console or Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    out.print(table(result))
    for line in told(result):
        out.print(line, markup=False)
