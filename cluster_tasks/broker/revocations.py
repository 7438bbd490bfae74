"""Revoked jobs, kept in Redis: a node that joins, or had lost its connection, missed what Celery has broadcast."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import redis
from celery.app.control import Control
from celery.utils.functional import maybe_list

from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, load_script, text

REVOKED_LIVES_S = 7 * 24 * 3600
"""A job that is delayed for longer runs, although it was revoked."""
REVOKED_AT_MOST = 100_000


class Revocations:
    """What was revoked in the last seven days. Raises BrokerUnavailable when Redis does not answer."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._revoke = load_script(client, __package__, "revoke")

    def add(self, job_ids: Iterable[str]) -> None:
        """Revoke jobs by id; of more than a hundred thousand the oldest are forgotten."""
        with foreign_errors(BrokerUnavailable, "revoking jobs"):
            self._revoke([self._keys.revoked], [REVOKED_LIVES_S, REVOKED_AT_MOST, *job_ids])

    def add_stamps(self, stamps: Mapping[str, Any]) -> None:
        """Revoke the jobs that bear one of these stamps: a value, or several, by header."""
        pairs = [json.dumps([header, value]) for header, values in stamps.items() for value in maybe_list(values)]
        with foreign_errors(BrokerUnavailable, "revoking jobs by their stamps"), self._client.pipeline() as pipe:
            pipe.sadd(self._keys.revoked_stamps, *pairs)
            pipe.expire(self._keys.revoked_stamps, REVOKED_LIVES_S)
            pipe.execute()

    def since(self, moment: float) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """Return the ids revoked since ``moment``, the moment of each, and all stamps.

        A moment is a second of Redis' clock that never goes back.
        """
        with foreign_errors(BrokerUnavailable, "reading revocations"), self._client.pipeline() as pipe:
            pipe.zrangebyscore(self._keys.revoked, moment, "+inf", withscores=True)
            pipe.smembers(self._keys.revoked_stamps)
            ids, pairs = pipe.execute()
        stamps: dict[str, list[Any]] = {}
        for header, value in map(json.loads, pairs):
            stamps.setdefault(header, []).append(value)
        return {text(job_id): score for job_id, score in ids}, stamps


class ClusterControl(Control):  # type: ignore[misc]
    """Celery's remote control; what it revokes is kept, and what it purges includes the lists of the cluster."""

    revocations: Revocations

    def revoke(self, task_id: Any, destination: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Revoke a job or several, for nodes that join later too. Raises BrokerUnavailable."""
        if destination is None:
            self.revocations.add(maybe_list(task_id))
        return super().revoke(task_id, destination, *args, **kwargs)

    def revoke_by_stamped_headers(self, headers: Any, destination: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Revoke the jobs with these stamps, for nodes that join later too."""
        if destination is None:
            self.revocations.add_stamps(headers)
        return super().revoke_by_stamped_headers(headers, destination, *args, **kwargs)

    def purge(self, connection: Any = None) -> int:
        """Empty the queues of the app and the lists of the cluster; return how many messages there were."""
        purged = int(super().purge(connection) or 0)
        with self.app.connection_or_acquire(connection) as held:
            lists = self.app.amqp.queues.lists_of_the_cluster()
            return purged + sum(held.default_channel.queue_purge(name) or 0 for name in lists)

    discard_all = purge
