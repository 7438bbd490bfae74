"""The text that the demo works on: docstrings of Python's standard library, or the files of a folder."""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster_tasks.errors import ConfigurationError

MAX_PASSAGES = 2_500
MIN_CHARACTERS = 60
MAX_CHARACTERS = 1_000
SUFFIXES = (".md", ".txt", ".py")
TESTS = frozenset({"test", "tests", "idle_test"})
SEED = 7
"""Files are read in the same mixed order each time, so that a part of them is still of all kinds."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text, and where it stands."""

    text: str
    source: str

    @property
    def beginning(self) -> str:
        """Its first sentence, or what there is of it in 200 characters."""
        line = " ".join(self.text.split())[:200]
        end = line.find(". ", MIN_CHARACTERS // 2)
        return line[:end] if end > 0 else line


def passages(directory: Path | None = None) -> list[Passage]:
    """Return up to 2,500 passages of the files below ``directory``, or of the standard library.

    Raises ConfigurationError if there is no text.
    """
    found = _of_files(directory) if directory else _of_docstrings(Path(sysconfig.get_path("stdlib")))
    taken = list(islice(found, MAX_PASSAGES))
    if not taken:
        where = f"in the {', '.join(SUFFIXES)} files of {directory}" if directory else "in the standard library"
        raise ConfigurationError(f"no text was found {where}: name a folder with --corpus")
    return taken


def split(text: str) -> Iterator[str]:
    """Yield the paragraphs of ``text``, short ones together, each up to 1,000 characters; remnants are left out."""
    held = ""
    for paragraph in (part.strip() for part in text.split("\n\n")):
        if len(held) + len(paragraph) > MAX_CHARACTERS and held:
            yield held[:MAX_CHARACTERS]
            held = ""
        held = f"{held}\n\n{paragraph}" if held else paragraph
    if len(held) >= MIN_CHARACTERS:
        yield held[:MAX_CHARACTERS]


def _of_files(directory: Path) -> Iterator[Passage]:
    for path in _mixed(path for path in directory.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        for text in split(path.read_text(encoding="utf-8", errors="replace")):
            yield Passage(text, str(path.relative_to(directory)))


def _of_docstrings(library: Path) -> Iterator[Passage]:
    # Read, never imported: some modules do things when they are.
    for path in _mixed(path for name in sys.stdlib_module_names for path in _sources(library, name)):
        module = ".".join(path.relative_to(library).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = "" if isinstance(node, ast.Module) else f".{node.name}"
                for text in split(ast.get_docstring(node) or ""):
                    yield Passage(text, module + name)


def _sources(library: Path, name: str) -> Iterable[Path]:
    if not (library / name).is_dir():
        return library.glob(f"{name}.py")
    # Tests hold files that are wrong on purpose.
    found = (library / name).rglob("*.py")
    return (path for path in found if not TESTS.intersection(path.relative_to(library).parts))


def _mixed(paths: Iterable[Path]) -> list[Path]:
    mixed = sorted(set(paths))
    random.Random(SEED).shuffle(mixed)
    return mixed
