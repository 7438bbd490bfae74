"""What people want to know of the cluster: a capped stream of events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis

from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, text

MAX_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something that happened: ``kind`` such as ``node lost``, with its facts."""

    id: str
    """Position in the stream; grows with time."""
    kind: str
    timestamp: float
    """Seconds since 1970, by the clock of whoever wrote the event."""
    facts: dict[str, Any]


class EventLog:
    """Writes and reads events. Raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys, clock: Clock) -> None:
        self._client, self._key, self._clock = client, keys.events, clock

    def add(self, kind: str, **facts: Any) -> None:
        """Append an event; beyond ten thousand the oldest go."""
        entry = {"kind": kind, "timestamp": self._clock.time(), "facts": json.dumps(facts)}
        with foreign_errors(BrokerUnavailable, f"writing event {kind!r}"):
            self._client.xadd(self._key, entry, maxlen=MAX_EVENTS, approximate=True)  # type: ignore[arg-type]

    def latest(self, count: int = 20) -> list[ClusterEvent]:
        """Return the last ``count`` events, the oldest first."""
        with foreign_errors(BrokerUnavailable, "reading events"):
            entries: Any = self._client.xrevrange(self._key, count=count)
        return [_decode(entry_id, fields) for entry_id, fields in reversed(entries)]

    def after(self, event_id: str, wait_s: float) -> list[ClusterEvent]:
        """Return the events behind ``event_id`` (``"0"``: all), waiting up to ``wait_s`` for the first."""
        with foreign_errors(BrokerUnavailable, "following events"):
            streams: Any = self._client.xread({self._key: event_id}, block=int(wait_s * 1000) or None)
        return [_decode(entry_id, fields) for _, entries in streams or [] for entry_id, fields in entries]


def _decode(entry_id: bytes, fields: dict[bytes, bytes]) -> ClusterEvent:
    facts = json.loads(fields[b"facts"])
    return ClusterEvent(text(entry_id), text(fields[b"kind"]), float(fields[b"timestamp"]), facts)
