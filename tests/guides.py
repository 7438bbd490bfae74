"""README.md and the pages of docs/ as tests read them: what their fences hold, and how it is to be run.

A fence says that in its first line:

- ``title="shop.py"``: a file, which the reader writes; it is there for the blocks that follow;
- ``begin="nothing"``, ``"redis"``, ``"cluster"`` or ``"model"``, a cluster with a chat model that calls tools: a
  session begins here, on a machine where so much runs. A page begins with a cluster unless its first block says
  something else;
- ``stays="yes"``: its commands go on, each in a terminal of its own;
- ``norun="why"``: it cannot be run in a test. Its syntax is checked all the same, as are the commands and settings
  in it.

All other shell and Python blocks are run, in their order and as they stand. A ``text`` block behind one is what it
prints: numbers may differ, and ``…`` stands for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BEGINNINGS = ("nothing", "redis", "cluster", "model")
RUN = ("python", "sh")
OPTIONS = frozenset({"title", "begin", "stays", "norun"})
LANGUAGES = frozenset({*RUN, "conf", "ini", "json", "lua", "sql", "text", "yaml", ""})
_FENCE = re.compile(r"^```(?P<language>\w*)(?P<options>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_OPTION = re.compile(r'\s+(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Block:
    """What one fence holds."""

    page: str
    """From the root of the repository."""
    line: int
    """Of its first line, from 1."""
    language: str
    options: Mapping[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether a reader runs it, and the test does too."""
        return self.language in RUN and not self.options.keys() & {"title", "norun"}

    def commands(self) -> list[str]:
        """The commands of a shell block, a continued line as one."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True, slots=True)
class Session:
    """What a reader does on one machine, from the beginning of a page or a block that begins anew."""

    page: str
    number: int
    begin: str
    """What runs there already."""
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{Path(self.page).stem}-{self.number}"


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """Return the fences of a page in their order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return tuple(
        Block(
            name,
            text.count("\n", 0, fence.start()) + 1,
            fence["language"],
            dict(_OPTION.findall(fence["options"])),
            fence["text"],
        )
        for fence in _FENCE.finditer(text)
    )


def all_blocks() -> Iterator[Block]:
    """Yield the fences of all pages."""
    for page in PAGES:
        yield from blocks_of(page)


def sessions() -> list[Session]:
    """Return the sessions in which there is something to run."""
    found = []
    for page in PAGES:
        begun: list[tuple[str, list[Block]]] = [("cluster", [])]
        for block in blocks_of(page):
            if "begin" in block.options:
                begun.append((block.options["begin"], []))
            begun[-1][1].append(block)
        running = [(begin, blocks) for begin, blocks in begun if any(block.is_run for block in blocks)]
        name = str(page.relative_to(ROOT))
        found += [Session(name, number, begin, tuple(blocks)) for number, (begin, blocks) in enumerate(running, 1)]
    return found


def prose_of(page: Path) -> str:
    """Return a page without its fences."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
