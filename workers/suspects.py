"""Jobs with a past, before their messages are read: a message that ends whoever reads it must not be read for ever.

From receipt to start a job goes through decoders and signal handlers that are not ours. What dies there is charged like
what dies of a job that runs; but the verdict on a job that runs is asked for when it starts, and this one never does.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import redis

from cluster_tasks.broker.deliveries import Deliveries, Past
from cluster_tasks.broker.members import is_to_be_split, member_ids
from cluster_tasks.broker.message import Delivery
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import QuarantinedError, UnavailableError
from workers.refusals import Refusals

logger = logging.getLogger(__name__)


class Suspects:
    """Looks at deliveries of a node whose jobs were delivered before."""

    def __init__(self, cluster: Cluster, node: Deliveries, refusals: Refusals) -> None:
        self._cluster, self._node, self._refusals = cluster, node, refusals

    def admit(self, delivery: Delivery, payload: dict[str, Any]) -> bool:
        """Whether a message may be read; if not, it is dealt with. Its body has not been touched yet."""
        job_id = (payload.get("headers") or {}).get("id")
        if not job_id:
            # Nobody counts the crashes of what has no name.
            return True
        try:
            return self._admit(delivery, job_id, payload)
        except (redis.RedisError, UnavailableError) as exc:
            logger.warning("job %s waits: %s", job_id, exc)
            self._node.let_lie(delivery.tag)
            return False

    def _admit(self, delivery: Delivery, job_id: str, payload: dict[str, Any]) -> bool:
        past = self._node.past(job_id)
        if past.crashes:
            # The last crash but one tells whether the job had begun when the last one came.
            unread = any(crash.received_since for crash in past.crashes[-2:-1])
            if unread and len(past.crashes) >= self._cluster.settings.max_crash_deliveries:
                self._end(delivery, job_id, payload, past)
                return False
            self._node.note_receipt(job_id, past.crashes, begun=False)
            # What was fetched with it is not at work while it is read.
            self._node.hold_back_undelivered()
        # To split it is to read it.
        return not (is_to_be_split(payload, bool(past.crashes)) and self._split(delivery, job_id, past))

    def _split(self, delivery: Delivery, message_id: str, past: Past) -> bool:
        """Let the members of a message go on alone; False if it cannot be read."""
        most = self._cluster.settings.max_message_bytes
        try:
            placed = self._node.split(delivery.tag, message_id, past.crashes[-1] if past.crashes else None, most)
        except ValueError as exc:
            logger.warning("message %s stays whole: %s", message_id, exc)
            return False
        logger.info("the %d jobs of message %s that have not ended go on one by one", max(placed, 0), message_id)
        return True

    def _end(self, delivery: Delivery, job_id: str, payload: dict[str, Any], past: Past) -> None:
        if past.ended:
            logger.error("what follows job %s is not told: its message ends whoever reads it", job_id)
            self._node.forget(job_id)
        else:
            headers, message = payload["headers"], self._node.message(delivery.tag)
            kept = self._cluster.quarantine.put(job_id, str(headers.get("task")), message, past.crashes)
            logger.error("job %s is in quarantine, it ends nodes before it begins: %s", job_id, kept.reason)
            # If what follows ends a node as well, the next one does not try.
            tries = len(past.crashes) - self._cluster.settings.max_crash_deliveries
            embedded = _plainly_embedded(payload) if tries == 0 else {}
            error = QuarantinedError(kept.reason)
            self._refusals.end_as_failed(delivery.tag, headers, payload["properties"], embedded, error)
            if member_ids(headers) and self._node.holds(delivery.tag):
                # With their ends only their own crashes are forgotten.
                self._node.forget(job_id)
        self._node.ack(delivery.tag)


def _plainly_embedded(payload: dict[str, Any]) -> dict[str, Any]:
    """What a message says of its callbacks, if that can be read by nothing but the standard library."""
    if payload.get("content-type") != "application/json" or payload["headers"].get("compression"):
        return {}
    try:
        _, _, embedded = json.loads(payload["body"])
        return dict(embedded)
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
