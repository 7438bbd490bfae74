"""Reading the stream of a job: entries in, events out. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster_tasks.streaming.entries import ENTRY_ID, Entry, checksum, place_of

END = "end"
"""The id of what comes with the result, and not by the stream."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of the text."""

    text: str
    id: str
    """To go on after it, in another process for instance."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """What was read so far is void: another attempt was made, on another node or by another provider.

    Its text follows from the beginning. Whoever goes on after the id of an earlier chunk is told this again.
    """


@dataclass(frozen=True, slots=True)
class Finished:
    """The job has succeeded; the chunks since the last restart, joined, are the text of its result."""

    result: Any
    id: str = END


Event = Chunk | Restarted | Finished


class Reading:
    """How far one reader has come."""

    def __init__(self, after: str = "") -> None:
        """``after`` is the id of the last chunk that was read; empty: none was. Raises ValueError if it is no id."""
        if after and after != END and not ENTRY_ID.fullmatch(after):
            raise ValueError(f"after={after[:80]!r} of a stream: expected the id of one of its chunks")
        self.position = before(after) if ENTRY_ID.fullmatch(after) else "0-0"
        """After it, entries are to be read. ``after`` itself is read again: it says how long the text was by then."""
        self.is_ending = False
        """Whether the attempt has come to its end: the result is near."""
        self._after = after
        self._length = self._checksum = 0
        """Of what was read."""
        self._fits = not after
        """Whether that is the text of an attempt from its beginning on."""
        self._is_shown = bool(after)
        """Whether there is text that a restart makes void."""

    def take(self, entries: Iterable[tuple[str, Mapping[bytes, bytes]]]) -> list[Event]:
        """Take entries as they come, and return what they bring."""
        events: list[Event] = []
        for entry_id, fields in entries:
            entry = Entry.read(fields)
            if self._after != END:
                events += self._take(entry_id, entry)
            self.position, self.is_ending = entry_id, entry.is_last
        return events

    def _take(self, entry_id: str, entry: Entry) -> Iterator[Event]:
        if entry_id == self._after:
            self._length, self._checksum, self._fits = entry.length, entry.checksum, bool(entry.text)
        elif entry.text and entry.length == len(entry.text):
            yield from self._restart()
            yield self._next(entry.text, entry_id)
        elif entry.text and self._fits:
            fits = entry.length == self._length + len(entry.text)
            self._fits = fits and entry.checksum == checksum(entry.text, self._checksum)
            if self._fits:
                yield self._next(entry.text, entry_id)

    def finish(self, text: str | None) -> list[Event]:
        """Take the text of the result, None if it has none; return what is missing of it."""
        if text is None or self._after == END:
            return []
        events: list[Event] = []
        if not self._fits or checksum(text[: self._length]) != self._checksum or len(text) < self._length:
            events += self._restart()
        if missing := text[self._length :]:
            events.append(self._next(missing, END))
        return events

    def _restart(self) -> Iterator[Event]:
        if self._is_shown:
            yield Restarted()
        self._length, self._checksum, self._fits, self._is_shown = 0, 0, True, False

    def _next(self, text: str, entry_id: str) -> Chunk:
        self._length += len(text)
        self._checksum = checksum(text, self._checksum)
        self._is_shown = True
        return Chunk(text, entry_id)


def before(entry_id: str) -> str:
    """Return an id that comes before another and after all that come before that in its attempt."""
    token, number = place_of(entry_id)
    return f"{token}-{max(number - 1, 0)}"
