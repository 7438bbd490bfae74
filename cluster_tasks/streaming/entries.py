"""What is written into the stream of a job, and what its reader has told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from zlib import crc32

STREAM_LIVES_S, ENDED_LIVES_S = 600, 120
"""After its last entry, and after that of an attempt that has ended. Of a node that dies, nothing is left then."""
MOST_ENTRIES = 2_000
"""The most that a stream holds; of a longer one the beginning cannot be read again."""
AT_ONCE = 500
"""Entries that are read in one round trip."""
READER_LIVES_S = 120
"""How long it is kept what a reader has told; he tells it again at least every second."""
READ, GONE = "read", "gone"
"""Fields of what a reader tells: how far he is, with a number that he changes; and that no more is wanted."""
ENTRY_ID = re.compile(r"\d{1,18}-\d{1,18}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A piece of text, or that no more will come of this attempt, or both."""

    text: str = ""
    length: int = 0
    """Of the text with this piece, in characters."""
    checksum: int = 0
    """Of the same."""
    is_last: bool = False

    def fields(self) -> list[str | bytes]:
        """Return it as fields and values of a stream."""
        last: list[str | bytes] = ["last", "1"] if self.is_last else []
        if not self.text:
            return last
        return ["text", encoded(self.text), "length", str(self.length), "checksum", str(self.checksum), *last]

    @classmethod
    def read(cls, fields: Mapping[bytes, bytes]) -> Self:
        """Read what ``fields`` wrote."""
        text = fields.get(b"text", b"").decode("utf-8", "surrogatepass")
        length, summed = (int(fields.get(name, 0)) for name in (b"length", b"checksum"))
        return cls(text, length, summed, b"last" in fields)


def encoded(text: str) -> bytes:
    """Return text as UTF-8; half of a surrogate pair, which JSON can bring, goes through as it is."""
    return text.encode("utf-8", "surrogatepass")


def checksum(text: str, before: int = 0) -> int:
    """Return the checksum of text that follows one with the checksum ``before``."""
    return crc32(encoded(text), before)


def place_of(entry_id: str) -> tuple[int, int]:
    """Return the fencing token of the attempt that an entry is of, and its number there, from 1."""
    token, _, number = entry_id.partition("-")
    return int(token), int(number)
