"""The ready-made jobs as LangChain calls them: sent, and waited for, with and without asyncio."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import closing
from importlib import import_module
from typing import Any

from celery import Celery
from celery.result import AsyncResult

from cluster_tasks.tasks.apps import cluster_of, sending_app
from cluster_tasks.tasks.base import ClusterTask

AT_ONCE = 8
"""Jobs of one call that are under way at once."""


class Sender:
    """Sends jobs of ``app``, None: of the app that the ready-made jobs belong to, and waits ``timeout_s`` for each.

    Raises what ``delay`` and ``get`` raise, celery.exceptions.TimeoutError among that. A job that nobody waits for any
    more, because of that or because its caller was cancelled, is revoked.
    """

    def __init__(self, app: Celery | None, timeout_s: float | None) -> None:
        self._app, self.timeout_s = app, timeout_s

    @property
    def app(self) -> Celery:
        """Whose jobs are sent. Raises ClusterError if it is in no cluster."""
        app = self._app or sending_app()
        cluster_of(app)
        return app

    def task(self, name: str) -> ClusterTask:
        """Return a ready-made job by its name."""
        # Now and not before: a node serves the types of all jobs that its process has imported.
        import_module(f"cluster_tasks.tasks.{name.partition('.')[0]}")
        task: ClusterTask = self.app.tasks[name]
        return task

    def call(self, name: str, **arguments: Any) -> Any:
        """Send one job, and return its result."""
        (result,) = self.calls(name, [arguments])
        return result

    async def acall(self, name: str, **arguments: Any) -> Any:
        """As ``call``, for asyncio."""
        (result,) = [result async for result in self.acalls(name, [arguments])]
        return result

    def calls(self, name: str, many: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """Send a job for each of ``many`` arguments, some at a time, and yield their results in that order."""
        with closing(_UnderWay(self.task(name), many)) as jobs:
            for job in jobs:
                yield job.get(timeout=self.timeout_s)

    async def acalls(self, name: str, many: Iterable[Mapping[str, Any]]) -> AsyncIterator[Any]:
        """As ``calls``, for asyncio."""
        awaiting = cluster_of(self.app).awaiting
        with closing(_UnderWay(self.task(name), many)) as jobs:
            for job in jobs:
                yield await awaiting.wait(job, self.timeout_s)


class _UnderWay:
    """The jobs of one call, each yielded when it is to be waited for, while others after it are sent already."""

    def __init__(self, task: ClusterTask, many: Iterable[Mapping[str, Any]]) -> None:
        self._task, self._many = task, iter(many)
        self._jobs = deque[AsyncResult]()

    def __iter__(self) -> Iterator[AsyncResult]:
        while True:
            for arguments in self._many:
                self._jobs.append(self._task.delay(**arguments))
                if len(self._jobs) == AT_ONCE:
                    break
            if not self._jobs:
                return
            yield self._jobs[0]
            self._jobs.popleft()

    def close(self) -> None:
        """Revoke those that nobody will wait for."""
        for job in self._jobs:
            if job._cache is None:  # It has not ended, as far as is known here.
                job.revoke()
