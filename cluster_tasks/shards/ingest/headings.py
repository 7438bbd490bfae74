"""Under which heading, or in which class and function, a place of a text is."""

from __future__ import annotations

import ast
import re
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from cluster_tasks.shards.ingest.readers import Format

MAX_HEADING = 200
"""Characters."""
_LINE_END = re.compile(r"\r\n|\n|\r")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*$", re.DOTALL | re.MULTILINE)
_warnings_lock = threading.Lock()
_Mark = tuple[int, str]
"""A line, counted from 0, and what is in force from there on; empty: nothing."""


class Headings:
    """The headings of a text: in Markdown with those above them, ``Setup > Linux``; in Python ``Class.method``.

    Of other texts, and of a program that is none, nothing is known.
    """

    def __init__(self, text: str, written: Format) -> None:
        marks: Sequence[_Mark] = ()
        if written == "markdown":
            marks = list(_of_markdown(text))
        elif written == "python":
            marks = list(_of_python(text))
        starts = [0, *(end.end() for end in _LINE_END.finditer(text))]
        self._offsets = [starts[min(line, len(starts) - 1)] for line, _ in marks]
        self._titles = [title[:MAX_HEADING] for _, title in marks]

    def at(self, offset: int) -> str:
        """Return the heading that is in force at a character of the text; empty: none."""
        position = bisect_right(self._offsets, offset)
        return self._titles[position - 1] if position else ""


def _of_markdown(text: str) -> Iterator[_Mark]:
    from markdown_it import MarkdownIt

    front = _FRONT_MATTER.match(text)
    body_line = len(_LINE_END.findall(front[0])) if front else -1
    above: list[tuple[int, str]] = []
    # What stands within a line does not matter here, and takes most of the time.
    tokens = MarkdownIt("commonmark").disable("inline").parse(text)
    for token, content in pairwise(tokens):
        if token.type != "heading_open" or token.map is None or token.map[0] <= body_line:
            continue
        level, title = int(token.tag[1:]), " ".join(content.content.split())
        above = [*((other, named) for other, named in above if other < level), (level, title)]
        yield token.map[0], " > ".join(named for _, named in above if named)


def _of_python(text: str) -> Iterator[_Mark]:
    try:
        # What Python thinks of a user's program is not for the log. The filters belong to the whole process.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return iter(())
    return _definitions(tree, "")


def _definitions(parent: ast.AST, name: str) -> Iterator[_Mark]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            own = f"{name}.{node.name}" if name else node.name
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield first - 1, own
            yield from _definitions(node, own)
            yield node.end_lineno or node.lineno, name
        elif isinstance(node, ast.stmt):
            yield from _definitions(node, name)
