"""What an HTML page shows, as Markdown: headings, paragraphs, lists, tables and preformatted text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster_tasks.errors import ConfigurationError

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
SILENT = frozenset({"script", "style", "template", "svg", "noscript", "iframe", "object", "select", "textarea"})
"""What they hold is not read."""
BLOCKS = frozenset(HEADINGS) | {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "legend", "li", "main", "nav", "ol", "p",
    "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul",
}  # fmt: skip
"""Where they begin and end, a block of text does."""
CELLS = frozenset({"td", "th"})
PREFORMATTED = "pre"


def markdown_of(html: str) -> str:
    """Return what ``html`` shows. A page without a heading of the first level begins with its title.

    Raises ConfigurationError if selectolax is not installed.
    """
    # The parser of the standard library takes a minute for a page of 80 kB that is nothing but tags left open.
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise ConfigurationError("HTML files need selectolax: install cluster-tasks[retrieval]") from None
    root = LexborHTMLParser(html).root
    page = _Page()
    if root is not None:
        _walk(root, page)
    blocks = page.blocks
    if page.title and not any(block.startswith(HEADINGS["h1"]) for block in blocks):
        blocks = [HEADINGS["h1"] + page.title, *blocks]
    return "\n\n".join(blocks)


def _walk(root: LexborNode, page: _Page) -> None:
    # A page may be nested deeper than Python calls itself: a tag by itself stands for its end.
    ahead: list[LexborNode | str] = [root]
    while ahead:
        node = ahead.pop()
        if isinstance(node, str):
            page.end(node)
        elif node.is_text_node:
            page.say(node.text_content or "")
        elif (tag := node.tag or "") not in SILENT:
            page.begin(tag)
            ahead.append(tag)
            ahead.extend(reversed(list(node.iter(include_text=True))))


class _Page:
    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.title = ""
        self._said: list[str] = []
        self._before = ""
        """What the next block begins with."""
        self._preformatted = 0
        """How many elements are open in which white space counts."""

    def begin(self, tag: str) -> None:
        if tag in BLOCKS:
            self._end_block()
        if tag in HEADINGS or tag == "li":
            self._before = HEADINGS.get(tag, "- ")
        elif tag in CELLS and self._said:
            self._said.append(" | ")
        self._preformatted += tag == PREFORMATTED

    def say(self, text: str) -> None:
        self._said.append(text)

    def end(self, tag: str) -> None:
        if tag == "title":
            self.title, self._said = self.title or self._words(), []
        elif tag == PREFORMATTED and self._preformatted == 1:
            self._end_preformatted()
        elif tag in BLOCKS:
            self._end_block()
        if tag in HEADINGS or tag == "li":
            self._before = ""
        self._preformatted -= tag == PREFORMATTED

    def _end_block(self) -> None:
        """Add what was said since the last block, if anything."""
        if self._preformatted:
            self._said.append("\n")
            return
        if words := self._words():
            self.blocks.append(self._before + words)
            self._before = ""
        self._said = []

    def _end_preformatted(self) -> None:
        text = "".join(self._said).strip("\n")
        if text.strip():
            self.blocks.append(f"```\n{text}\n```")
        self._said = []

    def _words(self) -> str:
        return " ".join("".join(self._said).split())
