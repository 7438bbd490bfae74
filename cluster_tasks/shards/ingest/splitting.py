"""Documents become passages, not longer than wanted, cut where sections, definitions, paragraphs or sentences end."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.shards.documents import Document
from cluster_tasks.shards.ingest.headings import Headings
from cluster_tasks.shards.ingest.readers import PAGE_END, Format

if TYPE_CHECKING:
    from semantic_text_splitter import CodeSplitter, MarkdownSplitter, TextSplitter

MIN_SIZE, MAX_SIZE = 16, 100_000
TOKENIZER = "text-embedding-3-small"
"""Whose tokens are counted. Its vocabulary comes with the splitter; other models count a little differently."""
MAX_WHOLE_ID = 490
"""Characters of the id of a document that is split: its passages' ids are a little longer."""
PASSAGE = "#passage-"
"""Between the id of a document and the number of a passage, in the id of that."""
WHOLE = "document"
"""The metadata of a passage that holds the id of its document."""
ADDED_BY = "added_by"
"""The metadata of a passage that holds the id of the job that added it: all of one version have the same."""
PASSAGE_KEYS = (WHOLE, "passage", "passages", "start", "heading", "page", ADDED_BY)
"""The metadata that a passage has by itself, beside those of its document."""


class Split(BaseModel):
    """How documents become passages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=1000, ge=MIN_SIZE, le=MAX_SIZE)
    """The most that a passage holds."""
    overlap: int | None = Field(default=None, ge=0)
    """How much of a passage the next one may repeat, up to half the size; None: a tenth of it."""
    unit: Literal["characters", "tokens"] = "characters"
    format: Format = "text"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.repeated > self.size // 2:
            raise ValueError(f"an overlap of {self.overlap} is more than half the size of {self.size}")
        return self

    @property
    def repeated(self) -> int:
        """The overlap, decided."""
        return self.size // 10 if self.overlap is None else self.overlap


def passage_id(document_id: object, number: object) -> str:
    """Return the id of a passage of a document."""
    return f"{document_id}{PASSAGE}{number}"


def names_passage(stored_id: str) -> bool:
    """Whether this is such an id, of whatever document."""
    return re.search(rf"{PASSAGE}\d+\Z", stored_id, re.ASCII) is not None


def document_of(stored_id: str, metadata: Mapping[str, Any]) -> str | None:
    """Return the id of the document of which something stored is a passage; None: of none.

    Others may use the same metadata in their own way: the id tells.
    """
    document_id, number, count = (metadata.get(key) for key in (WHOLE, "passage", "passages"))
    # A truth value is a number, too.
    if (type(document_id), type(number), type(count)) != (str, int, int):
        return None
    return document_id if stored_id == passage_id(document_id, number) else None


def split(document: Document, how: Split, added_by: str) -> list[Document]:
    """Return the passages of a document, in their order; none, if it is blank. Equal arguments give equal passages.

    A passage has the id of its document with ``#passage-`` and its number behind it, and the metadata of its document
    with ``document`` (the id of that), ``passage`` (its number, from 0), ``passages`` (how many there are), ``start``
    (its first character's place in the text, from 0), ``added_by`` and, as far as known, ``heading`` and ``page`` (from
    1, in a text with form feeds). Together they hold all of the text but white space. Raises ConfigurationError if the
    splitter is not installed.
    """
    cut = _splitter(how).chunk_indices(document.text)
    headings = Headings(document.text, how.format)
    page_ends = _page_ends(document.text) if how.format == "text" else []
    passages = []
    for number, (offset, text) in enumerate(cut):
        own: dict[str, Any] = {
            WHOLE: document.id, "passage": number, "passages": len(cut), "start": offset, ADDED_BY: added_by,
        }  # fmt: skip
        if heading := headings.at(offset):
            own["heading"] = heading
        if page_ends:
            own["page"] = bisect_right(page_ends, offset) + 1
        metadata = {**document.metadata, **own}
        passages.append(Document(id=passage_id(document.id, number), text=text, metadata=metadata))
    return passages


def _splitter(how: Split) -> TextSplitter | MarkdownSplitter | CodeSplitter:
    try:
        import tree_sitter_python
        from semantic_text_splitter import CodeSplitter, MarkdownSplitter, TextSplitter
    except ImportError as exc:
        raise ConfigurationError(f"splitting needs {exc.name}: install cluster-tasks[retrieval]") from None
    size, overlap = how.size, how.repeated
    if how.format == "python":
        language = tree_sitter_python.language()
        if how.unit == "tokens":
            return CodeSplitter.from_tiktoken_model(language, TOKENIZER, size, overlap)
        return CodeSplitter(language, size, overlap)
    kind = MarkdownSplitter if how.format == "markdown" else TextSplitter
    return kind.from_tiktoken_model(TOKENIZER, size, overlap) if how.unit == "tokens" else kind(size, overlap)


def _page_ends(text: str) -> list[int]:
    return [position for position, sign in enumerate(text) if sign == PAGE_END]
