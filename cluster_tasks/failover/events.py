"""What people want to know of the cluster: a capped stream of events."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import redis

from cluster_tasks.broker.epochs import MAX_EVENTS, Event
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text

logger = logging.getLogger(__name__)

FORGOTTEN_S = 30
LATEST_S = 1e11
"""Seconds since 1970 that no clock shows."""
UNREADABLE = "unreadable entry"
"""The kind of an entry of the stream that is no event."""


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
        self._client, self._keys, self._key, self._clock = client, keys, keys.events, clock

    def entry(self, kind: str, **facts: Any) -> Event:
        """Return an event as the stream has it, for a script that writes it in the step of which it tells."""
        return {"kind": kind, "timestamp": self._clock.time(), "facts": json.dumps(facts)}

    def add(self, kind: str, **facts: Any) -> None:
        """Append an event; beyond ten thousand the oldest go."""
        entry: Any = self.entry(kind, **facts)
        with foreign_errors(BrokerUnavailable, f"writing event {kind!r}"):
            self._client.xadd(self._key, entry, maxlen=MAX_EVENTS, approximate=True)

    def condition(self, begins: str, ends: str) -> Condition:
        """Return something that lasts, for this process to tell of; ``begins`` and ``ends`` are kinds of events."""
        return Condition(self, self._client, self._keys, begins, ends)

    def latest(self, count: int = 20) -> list[ClusterEvent]:
        """Return the last ``count`` events, the oldest first."""
        with foreign_errors(BrokerUnavailable, "reading events"):
            entries: Any = self._client.xrevrange(self._key, count=count)
        return [decode_event(entry_id, fields) for entry_id, fields in reversed(entries)]

    def after(self, event_id: str, wait_s: float) -> list[ClusterEvent]:
        """Return the events behind ``event_id`` (``"0"``: all), waiting up to ``wait_s`` for the first."""
        with foreign_errors(BrokerUnavailable, "following events"):
            streams: Any = self._client.xread({self._key: event_id}, block=int(wait_s * 1000) or None)
        return [decode_event(entry_id, fields) for _, entries in streams or [] for entry_id, fields in entries]


class Condition:
    """Something that lasts and that several processes see: its begin is told once, and once its end.

    Nobody tells of the end if all who saw it die; then it is forgotten after ``FORGOTTEN_S``. Raises BrokerUnavailable.
    """

    def __init__(self, log: EventLog, client: redis.Redis, keys: Keys, begins: str, ends: str) -> None:
        self._log, self._keys, self._begins, self._ends, self._seen = log, keys, begins, ends, False
        self._script = load_script(client, "cluster_tasks.broker", "condition")

    def holds(self, **facts: Any) -> None:
        """Tell that it has begun, if nobody has; to be called again and again while it lasts."""
        self._seen = True
        if self._tell(FORGOTTEN_S, self._begins, facts):
            logger.warning("%s: %s", self._begins, facts)

    def is_over(self, **facts: Any) -> None:
        """Tell that it is over, if this process saw it and nobody else has told."""
        if self._seen:
            if self._tell("", self._ends, facts):
                logger.warning("%s", self._ends)
            self._seen = False

    def _tell(self, lives_s: int | str, kind: str, facts: dict[str, Any]) -> bool:
        entry = self._log.entry(kind, **facts)
        with foreign_errors(BrokerUnavailable, f"writing event {kind!r}"):
            names = [self._keys.condition(self._begins), self._keys.events]
            return bool(self._script(names, [lives_s, MAX_EVENTS, *chain(*entry.items())]))


def decode_event(entry_id: bytes, fields: dict[bytes, bytes]) -> ClusterEvent:
    """Read an entry of the stream. One that somebody else wrote there, and is no event, is told as UNREADABLE."""
    position = text(entry_id)
    try:
        facts = json.loads(fields[b"facts"], parse_constant=_refuse)
        kind, timestamp = text(fields[b"kind"]), float(fields[b"timestamp"])
        if isinstance(facts, dict) and 0 <= timestamp < LATEST_S:
            return ClusterEvent(position, kind, timestamp, facts)
    except (LookupError, ValueError, RecursionError) as exc:
        logger.debug("the entry %s of the event stream is no event: %r", position, exc)
    return ClusterEvent(position, UNREADABLE, int(position.partition("-")[0]) / 1000, {})


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
