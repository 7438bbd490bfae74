"""The jobs whose time has not come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import redis

from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, text


@dataclass(frozen=True, slots=True)
class DelayedJob:
    """A job that waits in Redis until it is due."""

    due: float
    """Seconds since 1970, by the clock of Redis."""
    node: str | None
    """The id of the node that it was routed to, if that was one."""
    request_type: str
    payload: dict[str, Any]
    """Its message, decoded."""


def delayed_jobs(client: redis.Redis, keys: Keys, most: int) -> list[DelayedJob]:
    """Return the ``most`` jobs that are due first. Raises BrokerUnavailable when Redis does not answer."""
    with foreign_errors(BrokerUnavailable, "reading delayed jobs"):
        entries: Any = client.zrange(keys.delayed, 0, most - 1, withscores=True)
    return [_read(text(entry), due, keys) for entry, due in entries if entry.count(b"\n") >= 4]


def entry_message(entry: bytes) -> bytes:
    """Return the message of a member of the sorted set."""
    return entry.split(b"\n", 4)[-1]


def _read(entry: str, due: float, keys: Keys) -> DelayedJob:
    queue, _, request_type, _, message = entry.split("\n", 4)
    return DelayedJob(due, keys.node_of(queue), request_type, json.loads(message))
