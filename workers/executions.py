"""What the pool of a worker is at work on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state

from workers.counting import type_of
from workers.request import ClusterRequest


class Executions:
    """The jobs between the event loop and the pool, as Celery's own records tell. Thread-safe."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        # Tasks of the other pools share the process of the worker.
        self.can_stop = isinstance(pool, PreforkPool)
        """Whether a job can be stopped while it runs."""

    def stop(self, tags: Collection[str]) -> int:
        """End the processes of these deliveries, where the pool has any; return how many jobs are stopped.

        Nobody is charged, and nothing is stored for them: the cluster has given them to others.
        """
        if not self.can_stop:
            return 0
        stopped = [request for request in _requests() if _tag(request) in tags]
        for request in stopped:
            request.stop(self._pool.terminate_job)
        return len(stopped)

    def tags(self) -> set[str]:
        """The deliveries that are with the pool, run or not."""
        return {_tag(request) for request in _requests()} - {""}

    def by_type(self) -> Counter[str]:
        """How many jobs of the cluster are here, by request type: with the pool, or waiting for it."""
        return Counter(type_of(request.task) for request in _requests() if _tag(request))

    def foreign(self) -> list[str]:
        """The ids of jobs that came from queues that are not the cluster's and have not ended."""
        return [request.id for request in _requests() if not _tag(request)]

    def not_taken_up(self) -> set[str]:
        """The ids of jobs that were handed to the pool and that no process or thread of it has begun."""
        return {request.id for request in _requests() if request._apply_result and not request.time_start}


def _requests() -> list[Any]:
    while True:
        try:
            return list(state.reserved_requests)
        except RuntimeError:
            # Another thread has changed it meanwhile.
            continue


def _tag(request: Any) -> str:
    return request.delivery_tag if isinstance(request, ClusterRequest) else ""
