"""What commands print: one JSON document for scripts, a table on a terminal, tab-separated text into a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = "-"
"""Stands for an empty cell, so that a line has as many words as it has columns."""
STYLES = {
    "online": "green",
    "healthy": "green",
    "degraded": "red",
    "busy": "yellow",
    "draining": "magenta",
    "offline": "red",
    "silent": "red",
    "node lost": "red",
}


WIDE = 120
"""From so many characters a line on, a terminal shows the columns that are marked ``wide``."""

Cell = str | Sequence[str]
"""What one column says of one thing, in a word or in several."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, whether it holds numbers, and how a terminal shows it."""

    name: str
    number: bool = False
    wide: bool = False
    whole: bool = False
    """Its cells stay on one line; others give way."""
    min_width: int | None = None


def print_json(value: Any, *, one_line: bool = False) -> None:
    """Print ``value`` as one JSON document."""
    click.echo(json.dumps(value, indent=None if one_line else 2))


def console() -> Console:
    """Return the terminal, in colour unless the command line or NO_COLOR says otherwise."""
    of_celery = click.get_current_context().obj
    return Console(no_color=(of_celery is not None and of_celery.no_color) or None, highlight=False)


def print_rows(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, header: bool = True) -> None:
    """Print rows of as many cells as there are columns. A pipe gets every column and no escape code."""
    if sys.stdout.isatty():
        screen = console()
        screen.print(table(columns, rows, header, screen.width >= WIDE))
        return
    lines = [[_joined(cell, ",") for cell in row] for row in rows]
    for line in [[column.name for column in columns], *lines] if header else lines:
        click.echo("\t".join(line))


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], header: bool, wide: bool) -> Table:
    """Return rows as a terminal shows them, with the columns for wide ones or without."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, show_header=header)
    shown = [column for column in columns if wide or not column.wide]
    for column in shown:
        made.add_column(
            column.name.replace("_", " "),
            justify="right" if column.number else "left",
            overflow="fold",
            no_wrap=column.whole,
            min_width=column.min_width,
        )
    for row in rows:
        cells = [_joined(cell, ", ") for column, cell in zip(columns, row, strict=True) if column in shown]
        made.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in cells))
    return made


def _joined(cell: Cell, separator: str) -> str:
    return printable((cell if isinstance(cell, str) else separator.join(cell)) or NOTHING)


def printable(words: str) -> str:
    """Return ``words`` with what could steer a terminal, a tab and an escape code among it, written as in a program."""
    if words.isprintable():
        return words
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in words)


def moment(timestamp: float) -> str:
    """Return seconds since 1970 as a local time with its offset, in ISO 8601."""
    return datetime.fromtimestamp(timestamp).astimezone().isoformat(timespec="seconds")
