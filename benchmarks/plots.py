"""Plots of what benchmarks have found: ``python -m benchmarks.plots build/benchmarks [--into docs/images]``.

Reads ``NAME.json`` of the folder, as ``python -m benchmarks`` writes and ``python -m benchmarks.NAME --json`` prints
them, and makes ``benchmark-NAME.png`` of each that it can draw. Install ``cluster-tasks[benchmarks]`` for matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Result, Row

BLUE, RED, GREY = "#2563eb", "#dc2626", "#9ca3af"
DPI = 110


def numbers(rows: Sequence[Row], name: str, figure: str) -> dict[int, float]:
    """Return a figure by the number that begins a row's name, of the rows whose names end with ``name``."""
    found = {}
    for row in rows:
        first = re.match(r"[\d,]+", row.name)
        if first and row.name.endswith(name) and figure in row.figures:
            found[int(first[0].replace(",", ""))] = float(row.figures[figure])
    return found


def draw_scale(result: Result, axes: Any) -> None:
    """What idle nodes cost Redis, by their number, beside the square that it must not be."""
    figure = "Redis, % of a CPU"
    simulated = numbers(result.rows, "simulated nodes, idle", figure)
    real = numbers(result.rows, "real nodes, idle", figure)
    sizes = sorted(simulated)
    axes.plot(sizes, [simulated[size] for size in sizes], "o-", color=BLUE, label="simulated")
    axes.plot(list(real), list(real.values()), "s", color=RED, label="real workers")
    first = simulated[sizes[0]]
    for power, style in ((1, ":"), (2, "--")):
        line = [first * (size / sizes[0]) ** power for size in sizes]
        axes.plot(sizes, line, style, color=GREY, label=f"exponent {power}")
    axes.set(xscale="log", yscale="log", xlabel="idle nodes", ylabel="Redis, % of one processor")
    axes.axhline(20, color=GREY, linewidth=0.8)


def draw_failover(result: Result, axes: Any) -> None:
    """How soon the work of a killed node is in other hands, by the size of the cluster."""
    for name, color in (("detected", GREY), ("re-owned", BLUE)):
        for figure, style in (("p50, s", "o--"), ("p99, s", "o-")):
            values = numbers(result.rows, name, figure)
            axes.plot(list(values), list(values.values()), style, color=color, label=f"{name}, {figure[:3]}")
    axes.axhline(5, color=GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="nodes", ylabel="seconds after the kill", ylim=(0, None))


def draw_balance(result: Result, axes: Any) -> None:
    """Warmth, and waiting beside it, of each way and load."""
    rows = [row for row in reversed(result.rows) if "slowdown p99" in row.figures]
    bars = axes.barh(
        [row.name for row in rows], [row.figures["warm, %"] for row in rows],
        color=[GREY if "Celery" in row.name else BLUE for row in rows],
    )  # fmt: skip
    told = [f"p99 slowdown {row.figures['slowdown p99']:,.0f}" for row in rows]
    axes.bar_label(bars, told, padding=4, fontsize=8)
    axes.set(xlabel="warm jobs, %", xlim=(0, 120))


def draw_llm(result: Result, axes: Any) -> None:
    """How long answers take, and how much of the prompts was warm."""
    rows = [row for row in result.rows if "p50, s" in row.figures]
    places = range(len(rows))
    axes.bar([place - 0.2 for place in places], [row.figures["p50, s"] for row in rows], 0.4, color=BLUE, label="p50")
    axes.bar([place + 0.2 for place in places], [row.figures["p99, s"] for row in rows], 0.4, color=GREY, label="p99")
    axes.set_xticks(list(places), [f"{row.name}\n{row.figures['warm, %']:.0f} % warm" for row in rows])
    axes.set(ylabel="seconds to the answer")


PLOTS: Mapping[str, Callable[[Result, Any], None]] = {
    "scale": draw_scale, "failover": draw_failover, "balance": draw_balance, "llm": draw_llm,
}  # fmt: skip


def draw(result: Result, path: Path) -> None:
    """Draw a result. Raises KeyError for a benchmark that has no plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        PLOTS[result.benchmark](result, axes)
        axes.set_title(result.title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        picture.savefig(path, dpi=DPI)
    finally:
        plt.close(picture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the JSON lies")
    parser.add_argument("--into", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    found = [path for name in PLOTS if (path := options.folder / f"{name}.json").exists()]
    if not found:
        parser.error(f"{options.folder} has none of {', '.join(f'{name}.json' for name in PLOTS)}")
    options.into.mkdir(parents=True, exist_ok=True)
    for path in found:
        result = Result.of_json(path.read_text(encoding="utf-8"))
        target = options.into / f"benchmark-{result.benchmark}.png"
        draw(result, target)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
