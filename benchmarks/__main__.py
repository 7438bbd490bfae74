"""All benchmarks, one after the other: ``python -m benchmarks [--full] [--only NAME …] [--into FOLDER]``.

Each runs as a command of its own, so that none finds what another left; its table closes it, its JSON goes to
``FOLDER/NAME.json``, all tables as Markdown to ``FOLDER/benchmarks.md``, and a table of whatever has a mark closes the
run. The short run takes ten minutes at most on two cores that have nothing else to do; the environments of other task
queues, which are made once, are not in them.

The exit code is 1 if a benchmark could not be run, and 0 otherwise: a mark that is missed is a result.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.report import STYLES, UNKNOWN, VERDICTS, Result, markdown, show, shown
from benchmarks.stage import HOME, alone
from workers.tether import tethered, tethering

ORDER = (
    "routing", "throughput", "profiling", "batching", "guarantees", "llm", "balance", "failover", "scale",
    "availability", "cache", "relevance", "retrieval", "shards", "memory", "zones",
)  # fmt: skip
"""Others come after these, by their names."""
MADE = re.compile(r"\bBenchmark\(\"(\w+)\"")
"""By this a module is known as a benchmark."""


def names() -> list[str]:
    """Return the names of all benchmarks of this folder."""
    texts = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    found = {name for text in texts for name in MADE.findall(text)}
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def run(name: str, full: bool) -> Result | None:
    """Run one; return what it found, or None if it failed, which it has told itself."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--full"] if full else [])]
    # A Ctrl-C of the terminal reaches this process alone, which tells it once: told twice, it would not tidy up.
    with subprocess.Popen(
        tethered(signal.SIGTERM, command), cwd=HOME, env=tethering(), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate()
        except BaseException:
            process.terminate()
            # Killed, it would leave behind what it has started.
            process.wait()
            raise
    return Result.of_json(said.splitlines()[-1]) if process.returncode == 0 else None


def marks(results: Sequence[Result]) -> Table:
    """Return the table that closes the run: whatever has a mark."""
    made = Table(title="Marks", title_justify="left")
    made.add_column("benchmark")
    made.add_column("")
    made.add_column("measured", justify="right")
    for name in ("mark", "", "reason"):
        made.add_column(name)
    for result in results:
        for row in result.rows:
            if row.mark is not None:
                verdict = VERDICTS[row.met]
                told = Text(verdict, style=STYLES[verdict]), "" if row.met else Text(row.reason or UNKNOWN)
                made.add_row(result.benchmark, Text(row.name), shown(row.marked), Text(str(row.mark)), *told)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the long run of each, whose figures are kept")
    parser.epilog = f"NAME is one of {', '.join(names())}."
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--into", type=Path, default=Path("build/benchmarks"), help="where the JSON goes")
    options = parser.parse_args()
    alone()
    options.into.mkdir(parents=True, exist_ok=True)
    out, begun_s = Console(width=None if sys.stdout.isatty() else 200, highlight=False), time.monotonic()
    results, failed = [], []
    for name in options.only:
        out.print(f"benchmarks.{name} …", style="dim")
        result = run(name, options.full)
        if result is None:
            failed.append(name)
            continue
        (options.into / f"{name}.json").write_text(result.as_json() + "\n", encoding="utf-8")
        show(result, out)
        results.append(result)
    (options.into / "benchmarks.md").write_text("\n\n".join(map(markdown, results)) + "\n", encoding="utf-8")
    out.print(marks(results))
    out.print(f"{time.monotonic() - begun_s:.0f} s; JSON and Markdown in {options.into}")
    for name in failed:
        out.print(f"benchmarks.{name} could not be run", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
