"""What an HTML page shows, as Markdown: headings, paragraphs, lists, tables and preformatted text."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
SILENT = frozenset({"script", "style", "template", "svg", "noscript", "iframe", "object", "select", "textarea"})
"""What they hold is not read."""
BLOCKS = frozenset(HEADINGS) | {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "dialog", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "legend", "li", "main", "nav", "ol",
    "p", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul",
}  # fmt: skip
"""Where they begin and end, a block of text does."""
CELLS = frozenset({"td", "th"})


def markdown_of(html: str) -> str:
    """Return what ``html`` shows. A page without a heading of the first level begins with its title."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.end()
    blocks = reader.blocks
    if (title := _words(reader.title)) and not any(block.startswith(HEADINGS["h1"]) for block in blocks):
        blocks = [HEADINGS["h1"] + title, *blocks]
    return "\n\n".join(blocks)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.title: list[str] = []
        self._said: list[str] = []
        self._before = ""
        """What the next block begins with."""
        self._silent: list[str] = []
        self._within: str | None = None
        """``title`` or ``pre``, where text is taken as it stands."""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in SILENT:
            self._silent.append(tag)
        elif self._silent:
            return
        elif tag in ("title", "pre"):
            self.end_block()
            self._within = tag
        elif tag in BLOCKS:
            self.end_block()
            if tag in HEADINGS or tag == "li":
                self._before = HEADINGS.get(tag, "- ")
        elif tag in CELLS and self._said:
            self._said.append(" | ")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        # <svg/> opens nothing that would have to be closed.
        if tag not in SILENT:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT:
            # Whatever was left open inside ends with it.
            if tag in self._silent:
                del self._silent[self._silent.index(tag) :]
        elif self._silent:
            return
        elif tag == self._within:
            self._end_within()
        elif tag in BLOCKS:
            self.end_block()
            if tag in HEADINGS or tag == "li":
                self._before = ""

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        (self.title if self._within == "title" else self._said).append(data)

    def end_block(self) -> None:
        """Add what was said since the last block, if anything."""
        if self._within == "pre":
            self._said.append("\n")
        elif words := _words(self._said):
            self.blocks.append(self._before + words)
            self._said, self._before = [], ""
        else:
            self._said = []

    def end(self) -> None:
        """Add what was said last, whatever is still open."""
        self._end_within()
        self.end_block()

    def _end_within(self) -> None:
        if self._within == "pre":
            text = "".join(self._said).strip("\n")
            self._said = []
            if text.strip():
                self.blocks.append(f"```\n{text}\n```")
        self._within = None


def _words(said: Sequence[str]) -> str:
    return " ".join("".join(said).split())
