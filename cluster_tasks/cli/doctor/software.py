"""Checks of the versions on this machine. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cluster_tasks.cli.doctor.facts import Facts
from cluster_tasks.cli.doctor.findings import Finding, bad, ok, warn

Version = tuple[int, ...]
SUPPORTED: dict[str, tuple[Version, Version | None]] = {
    "python": ((3, 11), None),
    "celery": ((5, 7), (5, 8)),
    "kombu": ((5, 7), (5, 8)),
    "redis": ((8,), (9,)),
    "flower": ((2, 2), (3,)),
    "click": ((8, 3, 1), (9,)),
}
"""From this version on, and below that one; as pyproject.toml says, and a test compares them."""


def version_of(text: str) -> Version:
    """Return the numbers at the beginning of a version: 7.0.15-rc1 is (7, 0, 15)."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Whether the cluster is made for these versions."""
    for name, (least, below) in SUPPORTED.items():
        check, found = f"version.{name}", facts.versions.get(name, "")
        wanted = f"{name}>={_text(least)}" + (f",<{_text(below)}" if below else "")
        if found and version_of(found) >= least and (below is None or version_of(found) < below):
            yield ok(check, found)
            continue
        yield bad(
            check,
            found or "not installed",
            f"the cluster leans on what {name} does inside, and is tried with {wanted} only",
            f"pip install '{wanted}'" if name != "python" else f"use {wanted}, in a new virtual environment",
        )
    if "hiredis" in facts.versions:
        yield ok("version.hiredis", facts.versions["hiredis"])
    else:
        yield warn(
            "version.hiredis", "not installed", "Python reads the replies of Redis, which costs each job time",
            "pip install 'redis[hiredis]'",
        )  # fmt: skip


def _text(version: Version) -> str:
    return ".".join(map(str, version))
