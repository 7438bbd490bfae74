"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, and something that may happen finds it unprepared."""
    BAD = "bad"
    """Jobs are not done or can be lost, now."""


EXIT_CODES = {Level.OK: 0, Level.WARN: 1, Level.BAD: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found; unless it is well, what that means and what to do about it."""

    check: str
    """Its name, ``subject.matter``; it stays the same."""
    level: Level
    found: str
    means: str = ""
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """Say that something is well."""
    return Finding(check, Level.OK, found)


def warn(check: str, found: str, means: str, remedy: str) -> Finding:
    """Say what may go wrong."""
    return Finding(check, Level.WARN, found, means, remedy)


def bad(check: str, found: str, means: str, remedy: str) -> Finding:
    """Say what goes wrong."""
    return Finding(check, Level.BAD, found, means, remedy)


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among them; ok if there are none."""
    return max((finding.level for finding in findings), key=EXIT_CODES.__getitem__, default=Level.OK)
