"""Which files of a folder are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from cluster_tasks.errors import UnreadableFile
from cluster_tasks.shards.ingest.readers import KINDS

MAX_FILE_BYTES = 64 << 20
NOT_ENTERED = ("__pycache__", "node_modules")
"""Folders that hold what programs made; hidden ones are not entered either."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which paths are wanted, by patterns as a shell has them: ``*.md``, ``drafts``, ``api/*/old``.

    A pattern is held against a path, against each folder above it, and against the bare name of each; ``*`` matches
    across folders, too. Paths are relative to the folder, with ``/``.
    """

    include: Sequence[str] = ()
    """None: all."""
    exclude: Sequence[str] = ()

    def includes(self, path: str) -> bool:
        """Whether ``path`` is among what is to be looked at, wanted or not."""
        return not self.include or _matches(path, self.include)

    def takes(self, path: str) -> bool:
        """Whether ``path`` is wanted."""
        return self.includes(path) and not _matches(path, self.exclude)


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a folder, by paths relative to it, in order."""

    paths: Sequence[str]
    skipped: dict[str, str]
    """Path → why it cannot be read by anybody."""
    failed: dict[str, str]
    """Path → what the system said. What is below may exist."""


def find(folder: Path, selection: Selection) -> Found:
    """Look for the wanted files of the kinds that have a reader.

    Hidden files and folders are passed over. A link to a file of the folder is read as that file, one that leads out of
    the folder is skipped: whoever made the folder could publish any file by it. A link to a folder is not followed: so
    no file comes twice, and a link that leads back ends nothing.
    """
    paths: list[str] = []
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    resolved = folder.resolve()

    def cannot_list(error: OSError) -> None:
        failed[_relative(folder, error.filename)] = f"cannot be listed: {error.strerror}"

    for path in _walk(folder, cannot_list):
        relative = path.relative_to(folder).as_posix()
        if not selection.takes(relative):
            continue
        try:
            if not _is_text(relative):
                skipped[relative] = "its name is not UTF-8"
            elif path.is_file():
                if path.is_symlink() and not path.resolve().is_relative_to(resolved):
                    skipped[relative] = "it is a link that leads out of the folder"
                else:
                    paths.append(relative)
            elif path.is_symlink() and not path.is_dir():
                skipped[relative] = "it is a link that leads to no file"
        except OSError as exc:
            failed[relative] = f"cannot be looked at: {exc.strerror}"
    return Found(sorted(paths), skipped, failed)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds. Raises UnreadableFile for one that is too large, OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableFile(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def _walk(folder: Path, cannot_list: Callable[[OSError], None]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, onerror=cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_ENTERED)
        yield from (
            Path(place, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in KINDS
        )


def _matches(path: str, patterns: Sequence[str]) -> bool:
    whole = PurePosixPath(path)
    candidates = [candidate for each in (whole, *whole.parents[:-1]) for candidate in (str(each), each.name)]
    return any(fnmatchcase(candidate, pattern.rstrip("/")) for pattern in patterns for candidate in candidates)


def _relative(folder: Path, path: str | None) -> str:
    return Path(path or folder).relative_to(folder).as_posix()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
