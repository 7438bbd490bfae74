"""Publishing the text of a job while it runs. It must cost the job nothing: neither an outage nor a reader can."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import redis

from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, StaleCommit, StreamAbandoned
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text
from cluster_tasks.streaming.entries import (
    ENDED_LIVES_S,
    ENTRY_ID,
    MOST_ENTRIES,
    STREAM_LIVES_S,
    Entry,
    checksum,
    place_of,
)

logger = logging.getLogger(__name__)

BATCH_S = 0.05
"""Text that comes within this time is one entry."""
LOOK_S = 0.5
"""How often it is looked whether the delivery stands and who reads, while there is nothing to write."""
AWAY_S = 1.0
"""After that Redis is tried again."""
WINDOW = 200
"""So many entries are written ahead of the reader; then the text waits here until he has caught up, or for the end."""
_SUPERSEDED, _TAKEN_AWAY = 1, 2


@dataclass(frozen=True, slots=True)
class Origin:
    """Which delivery of which job publishes."""

    job_id: str
    unacked: str
    """The hash that the delivery is in for as long as it stands."""
    tag: str
    token: int
    """Its fencing token: later deliveries have higher ones."""


class Publisher:
    """Publishes the text of one delivery, from a thread of its own.

    ``write`` takes any number of pieces and never waits for Redis. It raises StreamAbandoned once a reader has said
    that no more is wanted or, with ``cancel_after_s``, nobody has read for so long; and StaleCommit once the job was
    given to another node.
    """

    def __init__(
        self, client: redis.Redis, keys: Keys, clock: Clock, origin: Origin, cancel_after_s: float | None = None
    ) -> None:
        self._client, self._clock, self._origin, self._cancel_after_s = client, clock, origin, cancel_after_s
        self._keys = [origin.unacked, keys.stream(origin.job_id), keys.stream_reader(origin.job_id)]
        self._script = load_script(client, __package__, "publish")
        self._changed = threading.Condition()
        self._pending: list[str] = []
        self._length = self._checksum = 0
        """Of the attempt, as far as it is written."""
        self._number = self._read = 0
        """Of the last entry, and of the last one that was read."""
        self._sending: Entry | None = None
        """What may have been written, for its reply is not there. It is sent again as it is."""
        self._told: bytes | None = None
        self._told_at_s = clock.monotonic()
        """When the reader has told something new, by the clock of this process."""
        self._error: Exception | None = None
        self._is_closing = self._is_over = self._is_away = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._publish, name="stream-publisher", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Publish what is left, unless Redis is away or too much is not read yet: the result has it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def begin(self) -> None:
        """Begin anew: what was written so far is no part of the text."""
        with self._changed:
            self._pending.clear()
            self._sending, self._length, self._checksum = None, 0, 0

    def write(self, piece: str) -> None:
        """Take the next piece. Raises StreamAbandoned and StaleCommit."""
        if self._error is not None:
            raise self._error
        if piece:
            with self._changed:
                self._pending.append(piece)
                self._changed.notify()

    def _publish(self) -> None:
        while not self._is_over:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closing, LOOK_S)
                is_last = self._is_closing
            pause_s = self._exchange(is_last)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, pause_s)

    def _exchange(self, is_last: bool) -> float:
        """Write what there is to write, and learn who reads; return the time until the next."""
        entry = self._next_entry(is_last)
        fields = entry.fields() if entry is not None else []
        origin = self._origin
        lives_s = ENDED_LIVES_S if is_last else STREAM_LIVES_S
        arguments = [origin.tag, origin.token, self._number, lives_s, MOST_ENTRIES, *fields]
        try:
            with foreign_errors(BrokerUnavailable, f"publishing the text of job {origin.job_id}"):
                answer, told, is_unwanted = self._script(self._keys, arguments)
        except BrokerUnavailable as exc:
            if not self._is_away:
                logger.warning("%s", exc)
            # Meanwhile nobody could tell that he reads.
            self._is_away, self._told_at_s = True, self._clock.monotonic()
            self._is_over = is_last
            return AWAY_S
        self._is_away = False
        self._is_over = int(answer) in (_SUPERSEDED, _TAKEN_AWAY) or (entry is not None and entry.is_last)
        if int(answer) == _TAKEN_AWAY:
            self._error = StaleCommit(f"the text of job {origin.job_id} is not published: its delivery was taken away")
        self._written(entry)
        self._learn(told, is_unwanted=is_unwanted is not None)
        if entry is not None:
            return BATCH_S
        # What waits for the reader is no reason to look again at once, what comes next is.
        return LOOK_S if self._is_ahead() else 0.0

    def _is_ahead(self) -> bool:
        return self._number - self._read >= WINDOW

    def _next_entry(self, is_last: bool) -> Entry | None:
        with self._changed:
            if self._sending is None:
                piece = "" if self._is_ahead() else "".join(self._pending)
                if not piece and not is_last:
                    return None
                if piece:
                    self._pending.clear()
                self._number += 1
                length, summed = self._length + len(piece), checksum(piece, self._checksum)
                self._sending = Entry(piece, length, summed, is_last)
            return self._sending

    def _written(self, entry: Entry | None) -> None:
        with self._changed:
            # If it has begun anew meanwhile, this was of the attempt before.
            if entry is not None and self._sending is entry:
                self._sending, self._length, self._checksum = None, entry.length, entry.checksum

    def _learn(self, told: bytes | None, *, is_unwanted: bool) -> None:
        now_s = self._clock.monotonic()
        if told is not None and told != self._told:
            self._told, self._told_at_s = told, now_s
            position = text(told).partition(" ")[0]
            if ENTRY_ID.fullmatch(position):
                token, number = place_of(position)
                self._read = number if token == self._origin.token else 0
        nobody_reads = self._cancel_after_s is not None and now_s - self._told_at_s > self._cancel_after_s
        if is_unwanted or nobody_reads:
            why = "its reader wants no more" if is_unwanted else f"nobody has read for {self._cancel_after_s:g} s"
            self._error = self._error or StreamAbandoned(f"job {self._origin.job_id} is cancelled: {why}")
