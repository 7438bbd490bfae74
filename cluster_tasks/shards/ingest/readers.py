"""What a file says: its bytes become a text, and it is told how that is written."""

from __future__ import annotations

import codecs
import io
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from cluster_tasks.errors import ConfigurationError, UnreadableFile
from cluster_tasks.shards.ingest.html import markdown_of

Format = Literal["text", "markdown", "python"]
"""How a text is written; so it is known where it can be cut."""
PAGE_END = "\f"
"""Stands between the pages of a text."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DECLARED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
DECLARED_WITHIN = 1024
"""Browsers look for the encoding of a page in so many bytes."""
OF_HOSTS = ("punycode", "idna")
"""Codecs for names of hosts, which take the square of a text's length."""
MAX_PDF_CHARACTERS = 64 << 20
"""As many as the largest file of text may have: a small PDF can show one page a million times."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How files of some suffixes are read."""

    read: Callable[[bytes], str]
    """Raises UnreadableFile."""
    format: Format


def read(path: str, data: bytes) -> tuple[str, Format]:
    """Return what a file of one of ``KINDS`` says, and how that is written.

    Raises UnreadableFile, ConfigurationError.
    """
    kind = KINDS[PurePosixPath(path).suffix.lower()]
    # What a font or a page does not say in characters must not keep the rest from being stored.
    text = kind.read(data).encode(errors="replace").decode()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UnreadableFile("it holds no text" + (", maybe pictures of it" if kind.read is read_pdf else ""))
    return text, kind.format


def read_text(data: bytes, encoding: str = "utf-8") -> str:
    """Return text in ``encoding``, unless its first bytes name another."""
    encoding = next((named for mark, named in MARKS if data.startswith(mark)), encoding)
    try:
        text = data.decode(encoding)
    except (LookupError, ValueError):
        raise UnreadableFile(f"it is not text in {encoding.removesuffix('-sig').upper()}") from None
    if "\0" in text:
        raise UnreadableFile("it is not text: it holds zero bytes")
    return text


def read_python(data: bytes) -> str:
    """Return a program, in the encoding that it declares."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except SyntaxError:
        raise UnreadableFile("it is not text in the encoding that it declares, or in UTF-8") from None
    return read_text(data, _of_texts(encoding))


def read_html(data: bytes) -> str:
    """Return what a page shows, as Markdown, so that its headings are known. Raises ConfigurationError."""
    found = DECLARED.search(data, 0, DECLARED_WITHIN)
    declared = found[1].decode().lower() if found else "utf-8"
    # A declaration that can be read as ASCII stands in no page of two bytes a character.
    return markdown_of(read_text(data, "utf-8" if declared.startswith("utf-16") else _of_texts(declared)))


def read_pdf(data: bytes, most: int = MAX_PDF_CHARACTERS) -> str:
    """Return the text of all pages. Raises ConfigurationError if pypdf is not installed."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError
    except ImportError:
        raise ConfigurationError("PDF files need pypdf: install cluster-tasks[retrieval]") from None
    try:
        reader = PdfReader(io.BytesIO(data))
        # Many are encrypted just to forbid printing: they open without a password.
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableFile("it is encrypted")
        pages, length = [], 0
        for page in reader.pages:
            pages.append(page.extract_text().replace(PAGE_END, " "))
            length += len(pages[-1])
            if length > most:
                raise UnreadableFile(f"it holds more than {most} characters")
    except UnreadableFile:
        raise
    except DependencyError:
        raise UnreadableFile("it is encrypted, with AES") from None
    except Exception as exc:
        # A damaged file makes pypdf stumble in any way.
        raise UnreadableFile(f"it is no PDF that can be read: {type(exc).__name__}") from exc
    return f"\n{PAGE_END}\n".join(pages)


def _of_texts(declared: str) -> str:
    """Return a declared encoding, or UTF-8 as without a declaration if no text is in it."""
    try:
        return "utf-8" if codecs.lookup(declared).name in OF_HOSTS else declared
    except LookupError:
        return declared


_TEXT, _MARKDOWN, _HTML = Kind(read_text, "text"), Kind(read_text, "markdown"), Kind(read_html, "markdown")
KINDS = {
    ".txt": _TEXT, ".md": _MARKDOWN, ".markdown": _MARKDOWN, ".html": _HTML, ".htm": _HTML,
    ".pdf": Kind(read_pdf, "text"), ".py": Kind(read_python, "python"),
}  # fmt: skip
"""Suffix, in small letters → how such files are read."""
