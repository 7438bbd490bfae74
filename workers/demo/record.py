"""What happened to each job, in Redis streams that are only ever appended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text

ACCEPTED = "accepted"
"""``delay()`` had returned."""
EXECUTED = "executed"
"""An execution began."""
COMMITTED = "committed"
"""A result was written, a success or a failure."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened to a job."""

    position: str
    """In the stream."""
    job_id: str
    attempt: str
    """Task and number of the retry: only a second execution of the same attempt is a repetition."""
    node: str

    @property
    def at_s(self) -> float:
        """Seconds since 1970, by the clock of Redis, which is the same for all entries."""
        return redis_time_s(self.position)


class Record:
    """Writes and reads the streams. Errors of Redis pass through."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._prefix = client, f"{keys.name}:record:"

    def note(self, kind: str, job_id: str, attempt: str = "", node: str = "") -> None:
        """Append an entry."""
        self._client.xadd(self._prefix + kind, {"job": job_id, "attempt": attempt, "node": node})

    def read(self, kind: str, after: str = "0", wait_s: float | None = None) -> list[Entry]:
        """Return the entries behind the position ``after``, waiting up to ``wait_s`` for the first."""
        block_ms = None if wait_s is None else int(wait_s * 1000)
        streams: Any = self._client.xread({self._prefix + kind: after}, block=block_ms)
        return [
            Entry(text(position), text(fields[b"job"]), text(fields[b"attempt"]), text(fields[b"node"]))
            for _, entries in streams or []
            for position, fields in entries
        ]


def redis_time_s(position: str) -> float:
    """Return when an entry of a stream was written, in seconds since 1970 by Redis' clock."""
    return int(position.partition("-")[0]) / 1000
