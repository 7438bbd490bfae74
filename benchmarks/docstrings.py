"""A set to measure retrieval with that every Python brings along: the docstrings of its standard library.

- A passage is what the docstring of a public function, method or class says after its summary, if that is ten words or
  more; no name or signature is added. Equal ones are one passage.
- A summary is the first sentence of a docstring, if it has three words or more and the passage does not repeat it.
- A name is that of the function with those of its classes, as words: ``IMAP4.getquotaroot`` is "imap 4 getquotaroot".
- What a query is to find are the passages of all that have this summary, or this name.

Sources are read and not imported, so a release of Python gives the same set on every machine that has all of it.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
LEAST_WORDS, LEAST_SUMMARY = 10, 3
SENTENCE = re.compile(r"(?<=[.!?])\s")
PART_OF_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Query(NamedTuple):
    """What is asked, and which passages are right."""

    kind: str
    """``summary`` or ``name``."""
    text: str
    relevant: frozenset[str]

    @property
    def half(self) -> int:
        """0 or 1, as if by chance: what was chosen on one half is shown on the other."""
        return blake2b(self.text.encode(), digest_size=1).digest()[0] & 1


@dataclass(frozen=True, slots=True)
class Docstrings:
    """The whole set."""

    passages: dict[str, str]
    """Texts by id."""
    queries: list[Query]


def load() -> Docstrings:
    """Read the set from the standard library of this Python, in a second or two."""
    ids: dict[str, str] = {}
    relevant: dict[tuple[str, str], set[str]] = {}
    for names, docstring in _documented():
        summary, _, rest = docstring.partition("\n\n")
        if len(rest.split()) < LEAST_WORDS:
            continue
        text = " ".join(rest.split())
        passage = ids.setdefault(text, f"{len(ids):05}")
        sentence = SENTENCE.split(" ".join(summary.split()))[0]
        if len(sentence.split()) >= LEAST_SUMMARY and sentence not in text:
            relevant.setdefault(("summary", sentence), set()).add(passage)
        relevant.setdefault(("name", " ".join(map(as_words, names))), set()).add(passage)
    queries = [Query(*asked, frozenset(passages)) for asked, passages in relevant.items()]
    return Docstrings({passage: text for text, passage in ids.items()}, queries)


def as_words(name: str) -> str:
    """Return ``read_text``, ``readText`` and ``ReadText`` as "read text"."""
    return " ".join(PART_OF_NAME.findall(name)).lower()


def _documented() -> Iterator[tuple[tuple[str, ...], str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in LEFT_OUT or part.startswith(("_", "config-")) for part in parts[:-1]):
            continue
        if parts[-1].startswith("_") and parts[-1] != "__init__.py":
            continue
        for names, definition in _definitions(ast.parse(path.read_bytes())):
            if docstring := ast.get_docstring(definition):
                yield names, docstring


def _definitions(
    within: ast.Module | ast.ClassDef, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Definition]]:
    for node in within.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield (*names, node.name), node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, (*names, node.name))
