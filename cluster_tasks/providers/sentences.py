"""Where the sentences of a text are."""

from __future__ import annotations

import re

END = re.compile(
    r"(?<=[.!?])\s+|(?<=[。！？])"  # noqa: RUF001 - the full-width marks are meant
    r"|\n\s*\n|\n(?=\s*(?:[-*•#]|\d+[.)]\s))"
)
"""What is between two sentences: blanks behind a full stop, an empty line, the beginning of an item or a heading."""


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return where the sentences of a text begin and end, without the blanks around them.

    A full stop with a blank behind it ends a sentence, that of an abbreviation too.
    """
    edges = [0, *(edge for between in END.finditer(text) for edge in between.span()), len(text)]
    spans = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        part = text[start:end]
        if stripped := part.strip():
            first = start + part.index(stripped)
            spans.append((first, first + len(stripped)))
    return spans
