"""Views that go on until Ctrl-C: a live one on a terminal, one snapshot after the other into a pipe."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster_tasks.cli.group import Seconds
from cluster_tasks.cli.tables import WIDE, Cell, Column, console, moment, print_json, print_rows, table
from cluster_tasks.errors import UnavailableError

EVERY_S = 2.0
"""Between two looks; nodes report once a second."""
SHORTEST_S = 0.2
FRAME = 4
"""Lines that are no rows: the title, the head of the table, its rule, and what was left out."""
watch_option = click.option(
    "--watch", is_flag=False, flag_value=EVERY_S, type=Seconds(min=SHORTEST_S), metavar="[SECONDS]",
    help=f"Look again every so many seconds, {EVERY_S:g} without a number, until Ctrl-C.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """What one look at the cluster shows."""

    rows: Sequence[Sequence[Cell]]
    document: Any
    """The same for --json."""
    urgent: Sequence[bool] = ()
    """Which rows are shown first where there is no room for all."""
    summary: str = ""


Look = Callable[[], View]


def show(columns: Sequence[Column], look: Look, title: str, every_s: float | None, as_json: bool) -> None:
    """Print what a look shows; with ``every_s`` look again and again until Ctrl-C.

    Raises what the first look raises. Later an outage is told, and the looking goes on.
    """
    view = look()
    if every_s is None:
        _print(columns, view, as_json)
    elif as_json or not sys.stdout.isatty():
        _print_again_and_again(columns, view, look, every_s, as_json)
    else:
        _show_live(columns, view, look, title, every_s)


def _print(columns: Sequence[Column], view: View, as_json: bool) -> None:
    if as_json:
        print_json(view.document)
    else:
        print_rows(columns, view.rows)


def _print_again_and_again(columns: Sequence[Column], view: View, look: Look, every_s: float, as_json: bool) -> None:
    """Snapshots in tab-separated text have an empty line between them; with JSON each is a line."""
    with until_ended():
        while True:
            if as_json:
                print_json({"at": time.time(), "rows": view.document}, one_line=True)
            else:
                print_rows(columns, view.rows)
                click.echo()
            while True:
                time.sleep(every_s)
                try:
                    view = look()
                    break
                except UnavailableError as exc:
                    click.echo(f"{moment(time.time())} {' '.join(str(exc).split())}; trying again", err=True)


def _show_live(columns: Sequence[Column], view: View, look: Look, title: str, every_s: float) -> None:
    # On a screen of its own: a table that grows, and a terminal that is made smaller, leave nothing behind.
    screen, outage = console(), ""
    with until_ended(), Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            live.update(
                _screen(screen, columns, view, f"{title}, every {every_s:g} s; Ctrl-C ends it", outage), refresh=True
            )
            time.sleep(every_s)
            try:
                view, outage = look(), ""
            except UnavailableError as exc:
                # What was seen last stays in sight.
                outage = outage or f"since {moment(time.time())}: {' '.join(str(exc).split())}"


def _screen(screen: Console, columns: Sequence[Column], view: View, title: str, outage: str) -> RenderableType:
    room = max(screen.height - FRAME - bool(outage), 1)
    rows = first_rows(view, room)
    parts: list[RenderableType] = [Text(f"{title}  {view.summary}", "bold", no_wrap=True, overflow="ellipsis")]
    if outage:
        parts.append(Text(f"not up to date {outage}", "red", no_wrap=True, overflow="ellipsis"))
    parts.append(table(columns, rows, True, screen.width >= WIDE))
    if left_out := len(view.rows) - len(rows):
        parts.append(Text(f"… and {left_out} more: a larger terminal shows them, or --json", "dim"))
    return Group(*parts)


def first_rows(view: View, room: int) -> list[Sequence[Cell]]:
    """Return as many rows as there is room for, in their order; the urgent ones are the last to be left out."""
    urgent = view.urgent or [False] * len(view.rows)
    chosen = sorted(range(len(view.rows)), key=lambda number: not urgent[number])[:room]
    return [view.rows[number] for number in sorted(chosen)]


@contextmanager
def until_ended() -> Iterator[None]:
    """End the command at Ctrl-C or SIGTERM, as a shell expects it, when the terminal is as it was."""
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except KeyboardInterrupt:
        click.get_current_context().exit(128 + signal.SIGINT)


def _end(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
