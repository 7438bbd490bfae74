"""Jobs that are not run any more, because too many processes died while they ran."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from typing import Any

import redis
from kombu.utils.uuid import uuid

from cluster_tasks.broker.epochs import MAX_EVENTS
from cluster_tasks.broker.message import INTERRUPTED, check_payload, place_message
from cluster_tasks.broker.placement import Crash, Placer
from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable, ClusterError, JobNotFound
from cluster_tasks.failover.events import EventLog
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text

logger = logging.getLogger(__name__)

RETRY_OF = "retry_of"
"""The header of a job that was released from quarantine: the id under which it had failed."""

UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a record or a message raises that somebody else wrote."""


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
        if not self.crashes:
            return "its record cannot be read"
        last = self.crashes[-1]
        return f"{len(self.crashes)} processes died while it ran, the last on {last.node}: {last.reason}"

    @property
    def traceback(self) -> str:
        """The last one that is known, or nothing."""
        return next((crash.traceback for crash in reversed(self.crashes) if crash.traceback), "")

    @property
    def retry_of(self) -> str:
        """The id under which the job was in quarantine before, if it was."""
        with suppress(*UNREADABLE):
            return str(json.loads(self.message)["headers"].get(RETRY_OF) or "")
        return ""


class Quarantine:
    """Keeps jobs until people decide, for ``ttl_s`` and not more than ``most``, of which the oldest go.

    Raises BrokerUnavailable when Redis does not answer.
    """

    def __init__(self, client: redis.Redis, keys: Keys, clock: Clock, ttl_s: float, most: int) -> None:
        self._client, self._keys, self._clock, self._ttl_s, self._most = client, keys, clock, ttl_s, most
        self._placer, self._events = Placer(client, keys), EventLog(client, keys, clock)
        self._keep = load_script(client, "cluster_tasks.broker", "quarantine")

    def put(self, job_id: str, task: str, message: bytes, crashes: Sequence[Crash]) -> Quarantined:
        """Keep a job, and tell the event stream. Safe to repeat."""
        placement = place_message(json.loads(message), message, self._keys)
        kept = Quarantined(
            job_id, task, placement.request_type, crashes, self._clock.time(), message.decode(errors="replace")
        )
        with foreign_errors(BrokerUnavailable, f"keeping job {job_id} in quarantine"):
            event = self._events.entry("job quarantined", job=job_id, task=task, reason=kept.reason)
            self._prune(job_id, json.dumps(asdict(kept)), MAX_EVENTS, *chain(*event.items()))
        return kept

    def prune(self) -> None:
        """Forget the jobs that have been here for too long."""
        with foreign_errors(BrokerUnavailable, "pruning the quarantine"):
            self._prune("")

    def _prune(self, job_id: str, *kept: Any) -> None:
        names = [self._keys.quarantine, self._keys.quarantined, self._keys.events]
        if forgotten := self._keep(names, [int(self._ttl_s), self._most, job_id, *kept]):
            logger.warning("the quarantine has forgotten its %d oldest jobs", forgotten)

    def jobs(self, task: str = "") -> list[Quarantined]:
        """Return the jobs in quarantine, of one task if it is named, the first that came first."""
        return list(self.each(task))

    def each(self, task: str = "") -> Iterator[Quarantined]:
        """The same, read one by one: together their arguments may be more than the memory holds."""
        self.prune()
        for job_id in self.ids():
            with foreign_errors(BrokerUnavailable, "reading the quarantine"):
                record: Any = self._client.hget(self._keys.quarantine, job_id)
            if record is not None and (kept := _read(job_id, record)) and task in ("", kept.task):
                yield kept

    def ids(self) -> list[str]:
        """Return the ids of the jobs in quarantine, the first that came first."""
        with foreign_errors(BrokerUnavailable, "listing the quarantine"):
            found: Any = self._client.zrange(self._keys.quarantined, 0, -1)
        return [text(job_id) for job_id in found]

    def count(self) -> int:
        """Return how many jobs are in quarantine."""
        self.prune()
        return len(self.ids())

    def get(self, job_id: str) -> Quarantined:
        """Return one job. Raises JobNotFound."""
        self.prune()
        with foreign_errors(BrokerUnavailable, f"reading job {job_id} in quarantine"):
            record: Any = self._client.hget(self._keys.quarantine, job_id)
        if record is None:
            raise JobNotFound(job_id, self.ids())
        return _read(job_id, record)

    def retry(self, job_id: str) -> str:
        """Send a job again, as a new one whose id is returned and whose header ``retry_of`` names the old.

        It bears no crash, and is not part of the group or chord of the old one, which has counted that as failed.
        Raises JobNotFound, and ClusterError if what is kept of it cannot be read.
        """
        kept = self.get(job_id)
        try:
            payload = check_payload(json.loads(kept.message))
        except UNREADABLE as exc:
            raise ClusterError(f"job {job_id} cannot be sent again, for its record cannot be read: drop it") from exc
        new_id, headers, properties = uuid(), payload["headers"], payload["properties"]
        for header in ("group", "group_index"):
            headers.pop(header, None)
        headers.update({"id": new_id, RETRY_OF: job_id, "eta": None, "expires": None})
        properties.update(correlation_id=new_id, delivery_tag=uuid())
        for mark in ("redelivered", INTERRUPTED):
            (properties.get("delivery_info") or {}).pop(mark, None)
        placement = replace(place_message(payload, json.dumps(payload), self._keys), job_id=new_id)
        with foreign_errors(BrokerUnavailable, f"sending job {job_id} again"):
            if not self._placer.unquarantine(job_id, placement):
                raise JobNotFound(job_id, self.ids())
        return new_id

    def drop(self, job_id: str) -> None:
        """Forget a job. Raises JobNotFound."""
        with foreign_errors(BrokerUnavailable, f"dropping job {job_id} from quarantine"):
            with self._client.pipeline() as pipe:
                pipe.hdel(self._keys.quarantine, job_id)
                pipe.zrem(self._keys.quarantined, job_id)
                dropped, _ = pipe.execute()
            if not dropped:
                raise JobNotFound(job_id, self.ids())


def _read(job_id: str, record: bytes) -> Quarantined:
    """Return what is kept of a job, or what is left of that. Fields of newer nodes are left out."""
    try:
        kept = json.loads(record)
        crashes = [Crash(**_fields(Crash, crash)) for crash in kept["crashes"]]
        job = Quarantined(**{**_fields(Quarantined, kept), "id": job_id, "crashes": crashes})
        moment = float(job.quarantined_at)
    except UNREADABLE as exc:
        logger.warning("the record of job %s in quarantine cannot be read: %r", job_id, exc)
        return Quarantined(job_id, "", "", [], 0.0, "")
    return replace(job, task=str(job.task), quarantined_at=moment, message=str(job.message))


def _fields(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: given[one.name] for one in fields(kind) if one.name in given}
