"""What the doctor says, on a terminal, in a pipe, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.padding import Padding
from rich.text import Text

from cluster_tasks.cli.doctor.collecting import collect
from cluster_tasks.cli.doctor.facts import Facts
from cluster_tasks.cli.doctor.findings import EXIT_CODES, Finding, Level, bad, worst
from cluster_tasks.cli.doctor.jobs import check_jobs, check_locks, check_stores
from cluster_tasks.cli.doctor.nodes import check_clocks, check_coordinators, check_nodes, check_registry
from cluster_tasks.cli.doctor.server import check_server
from cluster_tasks.cli.doctor.software import check_versions
from cluster_tasks.cli.tables import Column, console, print_json, print_rows, printable
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ConfigurationError

CHECKS: Sequence[Callable[[Facts], Iterator[Finding]]] = (
    check_versions, check_server, check_registry, check_nodes, check_coordinators, check_clocks, check_jobs,
    check_locks, check_stores,
)  # fmt: skip
COLUMNS = (Column("level"), Column("check"), Column("found"), Column("means"), Column("remedy"))
STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.BAD: "red"}
INDENT = 6
CHECK_WIDTH = 18


def examine(facts: Facts) -> list[Finding]:
    """Return what all checks find. Pure."""
    return [finding for check in CHECKS for finding in check(facts)]


def diagnose(cluster: Cluster) -> list[Finding]:
    """Look at a cluster, and say what is found. An outage is a finding, not an error."""
    try:
        cluster.check()
        facts = collect(cluster)
    except ConfigurationError as exc:
        return [bad("settings", str(exc), "no command and no worker starts with it", "correct or remove that setting")]
    return examine(facts)


def tell(findings: Sequence[Finding], as_json: bool) -> int:
    """Print findings; return the exit code."""
    level = worst(findings)
    if as_json:
        print_json({"level": level, "findings": [asdict(finding) for finding in findings]})
    elif sys.stdout.isatty():
        _show(findings)
    else:
        print_rows(COLUMNS, [(each.level, each.check, each.found, each.means, each.remedy) for each in findings])
    return EXIT_CODES[level]


def _show(findings: Sequence[Finding]) -> None:
    """Show what is well in a line, and what is not with all there is to say, at the end."""
    screen = console()
    for finding in sorted(findings, key=lambda each: EXIT_CODES[each.level]):
        level, words = f"{finding.level:<{INDENT}}", f"{finding.check:<{CHECK_WIDTH}} {printable(finding.found)}"
        screen.print(Text.assemble((level, STYLES[finding.level]), words))
        if finding.means:
            screen.print(Padding(Text(f"means: {printable(finding.means)}"), (0, 0, 0, INDENT)))
            screen.print(Padding(Text(f"do:    {printable(finding.remedy)}", "bold"), (0, 0, 0, INDENT)))
    count = {level: sum(finding.level is level for finding in findings) for level in Level}
    screen.print(f"{count[Level.OK]} ok, {count[Level.WARN]} to think of, {count[Level.BAD]} bad", style="bold")


def about(example: str) -> str:
    """Return the help of the command, with the example of how it is called."""
    return f"""Look for what is wrong or may go wrong, and say what to do about it. Nothing is written.

    Looks at the versions here; at Redis: memory, eviction, what a restart loses, time-outs, buffers, replicas; at the
    registry, the nodes and their heartbeats, coordinators, clocks; at jobs of epochs that have ended, lists that nobody
    takes from, overdue and set-aside jobs, locks, results and cache. It takes a lease (3 s) if something looks dead.
    What cannot be looked at because Redis does not answer is left out.

    \b
    Exit codes: 0 all is well, 1 something may go wrong, 2 something goes wrong
    (without a word on stdout: wrong usage, or an app that cannot be loaded).

    \b
    Example: {example}
    """
