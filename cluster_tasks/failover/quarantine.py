"""Jobs that are not run any more, because too many processes died while they ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import redis
from kombu.utils.uuid import uuid

from cluster_tasks.broker.message import place_message
from cluster_tasks.broker.placement import Crash, Placer
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, JobNotFound
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, text

RETRY_OF = "retry_of"
"""The header of a job that was released from quarantine: the id under which it had failed."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A job in quarantine, with what it died of."""

    id: str
    task: str
    request_type: str
    crashes: Sequence[Crash]
    quarantined_at: float
    """Seconds since 1970, by the clock of the node that noticed."""
    message: str = field(repr=False)
    """As it was queued; it holds the arguments."""

    @property
    def reason(self) -> str:
        """Why it is not run any more, in words."""
        last = self.crashes[-1]
        return f"{len(self.crashes)} processes died while it ran, the last on {last.node}: {last.reason}"


class Quarantine:
    """Keeps jobs until people decide. Raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys, clock: Clock) -> None:
        self._client, self._keys, self._clock = client, keys, clock
        self._placer = Placer(client, keys)

    def put(self, job_id: str, task: str, message: bytes, crashes: Sequence[Crash]) -> Quarantined:
        """Keep a job. Safe to repeat."""
        placement = place_message(json.loads(message), message, self._keys)
        kept = Quarantined(
            job_id, task, placement.request_type, crashes, self._clock.time(), message.decode(errors="replace")
        )
        with foreign_errors(BrokerUnavailable, f"keeping job {job_id} in quarantine"):
            self._client.hset(self._keys.quarantine, job_id, json.dumps(asdict(kept)))
        return kept

    def jobs(self) -> list[Quarantined]:
        """Return all jobs in quarantine, the first that came first."""
        with foreign_errors(BrokerUnavailable, "listing the quarantine"):
            records: Any = self._client.hvals(self._keys.quarantine)
        return sorted(map(_read, records), key=lambda kept: (kept.quarantined_at, kept.id))

    def get(self, job_id: str) -> Quarantined:
        """Return one job. Raises JobNotFound."""
        with foreign_errors(BrokerUnavailable, f"reading job {job_id} in quarantine"):
            record: Any = self._client.hget(self._keys.quarantine, job_id)
        if record is None:
            raise self._not_found(job_id)
        return _read(record)

    def retry(self, job_id: str) -> str:
        """Send a job again, as a new one whose id is returned and whose header ``retry_of`` names the old.

        It bears no crash, and is not part of the group or chord of the old one, which has counted that as failed.
        Raises JobNotFound.
        """
        payload = json.loads(self.get(job_id).message)
        new_id, headers, properties = uuid(), payload["headers"], payload["properties"]
        for header in ("group", "group_index"):
            headers.pop(header, None)
        headers.update({"id": new_id, RETRY_OF: job_id, "eta": None, "expires": None})
        properties.update(correlation_id=new_id, delivery_tag=uuid())
        (properties.get("delivery_info") or {}).pop("redelivered", None)
        placement = replace(place_message(payload, json.dumps(payload), self._keys), job_id=new_id)
        with foreign_errors(BrokerUnavailable, f"sending job {job_id} again"):
            if not self._placer.unquarantine(job_id, placement):
                raise self._not_found(job_id)
        return new_id

    def drop(self, job_id: str) -> None:
        """Forget a job. Raises JobNotFound."""
        with foreign_errors(BrokerUnavailable, f"dropping job {job_id} from quarantine"):
            if not self._client.hdel(self._keys.quarantine, job_id):
                raise self._not_found(job_id)

    def _not_found(self, job_id: str) -> JobNotFound:
        return JobNotFound(job_id, [text(kept) for kept in self._client.hkeys(self._keys.quarantine)])


def _read(record: bytes) -> Quarantined:
    fields = json.loads(record)
    return Quarantined(**{**fields, "crashes": [Crash(**crash) for crash in fields["crashes"]]})
