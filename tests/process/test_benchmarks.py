"""The benchmarks of many workers, each at its least size: what they measure is there. How much, no test judges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.plots import PLOTS, draw
from benchmarks.report import Result

HOME = Path(__file__).parents[2]
LASTS_S = 280
LEAST = {
    "failover": ("--nodes", "3", "--kills", "1"),
    "availability": ("--workers", "3", "--slots", "1", "--lasts-s", "12", "--every-s", "8"),
    "scale": ("--nodes", "2", "4", "--simulated", "50", "200", "--lasts-s", "3"),
    "balance": ("--workers", "3", "--loads", "0.5", "--lasts-s", "4"),
    "llm": ("--workers", "2", "--slots", "2", "--sessions", "4", "--turns", "3"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LEAST)
def test_a_benchmark_measures_at_its_least_size(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *LEAST[name]]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=LASTS_S)
    assert done.returncode == 0, done.stderr[-3000:]
    result = Result.of_json(done.stdout.splitlines()[-1])
    assert result.benchmark == name
    assert any(row.mark for row in result.rows)
    rows = {row.name: row for row in result.rows}
    match name:
        case "failover":
            # Not before the lease of the other's last beat can be over.
            assert rows["3 nodes, detected"].figures["p50, s"] > 1.5
        case "availability":
            assert rows["cluster"].figures["no answer"] == 0
        case "scale":
            assert rows["4 real nodes, 1 killed at once at work"].figures["lost"] == 0
            assert {"50 simulated nodes, idle", "200 simulated nodes, idle", "growth of all"} <= rows.keys()
        case "balance":
            assert {"0.5 Celery, one queue", "0.5 Celery, static", "0.5 consistent_hash"} <= rows.keys()
        case "llm":
            assert [row.figures["answers"] for row in result.rows[:3]] == [12, 12, 12]
    if name in PLOTS:
        pytest.importorskip("matplotlib")
        draw(result, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5_000
