"""The result backend that ends a job in one step: its result is written and its delivery removed, or neither.

It stands in for Celery's Redis backend under the same URL, and only where results live in the broker's Redis: a script
cannot span two servers.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import redis
from celery import states
from celery.backends.redis import RedisBackend, SentinelBackend
from kombu.utils.encoding import bytes_to_str

from cluster_tasks.broker.message import Delivery
from cluster_tasks.errors import StaleCommit
from cluster_tasks.keys import DEFAULT_NAME, Keys
from cluster_tasks.redis_store import load_script


class _FencedCommit(RedisBackend):  # type: ignore[misc]
    """Commits the states of jobs that came from a node's list; all else is stored as ever."""

    @cached_property
    def _keys(self) -> Keys:
        return Keys(self.app.conf.broker_transport_options.get("cluster_name", DEFAULT_NAME))

    @cached_property
    def _note_script(self) -> redis.commands.core.Script:
        return load_script(self.client, __package__, "note")

    @cached_property
    def _commit_script(self) -> redis.commands.core.Script:
        return load_script(self.client, __package__, "commit")

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        delivery = Delivery.of(getattr(request, "properties", None))
        # A task may also store a state of another job (update_state): its own delivery does not speak for that one.
        if delivery is None or request.id != task_id:
            return super()._store_result(task_id, result, state, traceback, request=request, **kwargs)
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        # Celery's retry policy for results applies: a commit can be repeated, its tag makes it one.
        if state in states.READY_STATES:
            self.ensure(self._commit, (delivery, task_id, state, self.encode(meta), _has_sequel(request, state)))
        else:
            self.ensure(self._note, (delivery, task_id, self.encode(meta)))
        return result

    def _note(self, delivery: Delivery, task_id: str, encoded: Any) -> None:
        self._note_script(self._job_keys(delivery, task_id), [delivery.tag, encoded, int(self.expires or 0)])

    def _commit(self, delivery: Delivery, task_id: str, state: str, encoded: Any, sequel: bool) -> None:
        expires = self.failure_expires if state == states.FAILURE else self.expires
        names = [*self._job_keys(delivery, task_id), self._keys.counters]
        done = self._commit_script(names, [delivery.tag, encoded, int(expires or 0), int(sequel)])
        if done != 1:
            reason = "its delivery was taken away" if done == 0 else "it had ended before"
            raise StaleCommit(f"result {state} of job {task_id} by {delivery.node_id} refused: {reason}")

    def _job_keys(self, delivery: Delivery, task_id: str) -> tuple[str, str, str]:
        keys, result = self._keys, bytes_to_str(self.get_key_for_task(task_id))
        return keys.unacked(delivery.node_id, delivery.epoch), keys.terminal(task_id), result


def _has_sequel(request: Any, state: str) -> bool:
    """Whether something is still to be done after the result, so that the delivery must stand until the ack."""
    if request.chord:
        return True
    return bool(state != states.SUCCESS and (getattr(request, "chain", None) or request.errbacks))


class FencedRedisBackend(_FencedCommit):
    """For ``redis://``, ``rediss://`` and ``redis+socket://``."""


class FencedSentinelBackend(_FencedCommit, SentinelBackend):  # type: ignore[misc]
    """For ``sentinel://``."""


FENCED_BACKENDS = {
    "redis": f"{__name__}:FencedRedisBackend",
    "rediss": f"{__name__}:FencedRedisBackend",
    "socket": f"{__name__}:FencedRedisBackend",
    "sentinel": f"{__name__}:FencedSentinelBackend",
}
"""What Celery's loader is told to use by URL scheme."""
