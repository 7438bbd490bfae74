"""What a Kombu message says of itself: its job, its request type, its priority.

Scripts handle messages as opaque strings; whatever must be read in them is read here.
"""

from __future__ import annotations

import json
from bisect import bisect
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cluster_tasks.keys import ANY_TYPE, PRIORITY_STEPS, Keys, priority_suffixes
from cluster_tasks.model import REQUEST_TYPE

REQUEST_TYPE_PROPERTY = "request_type"
SENT_AT_PROPERTY = "sent_at"
"""When a job was sent, in seconds since 1970, by the clock of whoever sent it. Nothing is decided by it."""
BATCH_PROPERTY = "cluster_batch"
"""With which others a job can be done in one call: with how many, and a name that they share. The script that gives
jobs to nodes finds it by this name in the text of the message, so nothing of a user's is to be called that."""
STRATEGY_PROPERTY = "routed_by"
"""Where a route says, for traces, which strategy made it. The message that is sent does not have it."""
DELIVERY_PROPERTY = "cluster_delivery"
"""Where a delivered message says which delivery it is; see Delivery."""
INTERRUPTED = "interrupted"
"""Set in the delivery info of a job that was taken from a node which may have begun it, without a crash."""

_SUFFIXES = priority_suffixes()


@dataclass(frozen=True, slots=True)
class Delivery:
    """One handing of a job to one epoch of a node: the token that a commit is checked against."""

    node_id: str
    epoch: str
    tag: str

    @property
    def fencing_token(self) -> int:
        """A number that grows with every delivery in the cluster."""
        return int(self.tag.rpartition(".")[2])

    @classmethod
    def of(cls, properties: dict[str, Any] | None) -> Delivery | None:
        """Read it from the properties of a message or a task's request; None if it did not come from a node's list."""
        token = (properties or {}).get(DELIVERY_PROPERTY)
        # In a message from another queue it may be anything.
        match token:
            case [str() as node_id, str() as epoch, str() as tag]:
                return cls(node_id, epoch, tag)
        return None


@dataclass(frozen=True, slots=True)
class Placement:
    """A message and where it is to go: to a node's list ('' for none), else to the waiting list of its type."""

    queue: str
    waiting: str
    request_type: str
    suffix: str
    message: bytes | str
    job_id: str = ""

    def arguments(self) -> tuple[bytes | str, ...]:
        """The five arguments that the placing scripts take."""
        return (self.queue, self.waiting, self.request_type, self.suffix, self.message)


def job_of(message: bytes) -> str:
    """The id of the job of a message as it came; empty if it names none, or what can be none."""
    try:
        job_id: str = json.loads(message)["headers"]["id"]
        job_id.encode()
    except (AttributeError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return job_id


def place_message(payload: dict[str, Any], message: bytes | str, keys: Keys, queue: str = "") -> Placement:
    """Say where ``message`` goes, whose decoded form is ``payload``."""
    properties = payload.get("properties") or {}
    request_type = request_type_of(properties)
    return Placement(
        queue,
        keys.waiting_queue(request_type),
        request_type,
        priority_suffix(properties.get("priority")),
        message,
        str((payload.get("headers") or {}).get("id") or ""),
    )


def request_type_of(properties: dict[str, Any]) -> str:
    """The request type that the properties of a message declare, ``any`` if none that can be one."""
    declared = properties.get(REQUEST_TYPE_PROPERTY)
    return declared if isinstance(declared, str) and REQUEST_TYPE.fullmatch(declared) else ANY_TYPE


def due_time(payload: dict[str, Any]) -> float | None:
    """When a job is to run, in seconds since 1970; None: now, or it cannot be told, which is the worker's to refuse."""
    eta = (payload.get("headers") or {}).get("eta")
    if not isinstance(eta, str):
        return None
    try:
        due = datetime.fromisoformat(eta)
        # Whatever the time zone of the app is: so Celery's workers read it.
        return (due if due.tzinfo else due.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def replace_message(
    message: bytes, keys: Keys, *, delivered: bool, interrupted: bool = False, queue: str = ""
) -> Placement:
    """Say where a message goes that is placed again; one that was ``delivered`` is marked as redelivered.

    It goes on by itself, not with others in one call. One that was ``interrupted`` had maybe begun, and says so to
    tasks that must not run twice. Raises ValueError if it is not a Kombu message.
    """
    try:
        payload = check_payload(json.loads(message))
        if not delivered:
            return place_message(payload, message, keys, queue)
        properties = payload["properties"]
        properties.pop(BATCH_PROPERTY, None)
        marks = {"redelivered": True} | ({INTERRUPTED: True} if interrupted else {})
        properties["delivery_info"] = {**(properties.get("delivery_info") or {}), **marks}
        return place_message(payload, json.dumps(payload), keys, queue)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def check_payload(payload: Any) -> dict[str, Any]:
    """Return ``payload`` if it has the parts of a Kombu message. Raises ValueError."""
    if isinstance(payload, dict) and isinstance(properties := payload.get("properties"), dict):
        optional = payload.get("headers"), properties.get("delivery_info")
        if all(isinstance(part, dict | None) for part in optional):
            _check_id((payload.get("headers") or {}).get("id"))
            return payload
    raise ValueError("not a Kombu message")


def _check_id(job_id: Any) -> None:
    """Raise ValueError for a job id that can be no part of the name of a key. None is of a message that has none."""
    if not isinstance(job_id, str | None):
        raise ValueError("the id of its job is no text")
    # Half of a surrogate pair, which JSON can write and UTF-8 cannot; the error is a ValueError.
    (job_id or "").encode()


def priority_suffix(priority: Any) -> str:
    """The sub-list of a priority from 0 (first) to 9 (last), as Kombu's Redis transport reads and steps it."""
    try:
        level = min(max(int(priority), 0), 9)
    except (TypeError, ValueError, OverflowError):
        level = 0
    return _SUFFIXES[bisect(PRIORITY_STEPS, level) - 1]
