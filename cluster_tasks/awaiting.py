"""Results of jobs for asyncio: in each event loop one task and one connection ask for all that is waited for.

Celery has nothing of the kind: ``AsyncResult.get`` blocks its thread. Asking, and not listening, needs no subscription
for each job and is right after every outage. A result that was waited for so long is asked for again after a tenth of
that, so that a short job is not slowed down by much, nor Redis kept busy by long ones.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import AbstractEventLoop, Future
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import redis
from celery import Celery, states
from celery.backends.redis import RedisBackend
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, EagerResult, ResultBase, ResultSet

from cluster_tasks.errors import InvalidArguments
from cluster_tasks.redis_store import connect_async

logger = logging.getLogger(__name__)

SOONEST_S, LATEST_S = 0.005, 0.25
"""A result is asked for again after so long, at least and at most."""
SHARE = 0.1
"""Of the time that it was waited for."""
AT_ONCE = 500
"""Results that are asked for in one round trip."""
LINGER_S = 2.0
"""The connection is kept for so long when nobody waits."""
AWAY_S = 0.5
"""After that a result backend that did not answer is asked again."""

Metas = Mapping[str, Mapping[str, Any]]
"""What is stored of jobs, by their ids, as Celery's backends tell it."""
Read = Callable[[Sequence[str]], Awaitable[Metas]]


class Awaiting:
    """The results of one app. Safe to use in several threads, each with an event loop of its own."""

    def __init__(self, app: Celery, sentinel_master: str) -> None:
        """No I/O."""
        self._app, self._sentinel_master = app, sentinel_master
        self._askers: dict[AbstractEventLoop, _Asker] = {}

    async def wait(self, result: Any, timeout_s: float | None = None, *, propagate: bool = True) -> Any:
        """Return the result of a job, or of each job of a group, and raise what ``result.get()`` raises.

        That is the error of the job, or of one before it in its chain, and celery.exceptions.TimeoutError after
        ``timeout_s`` (None: never). With ``propagate=False`` the error is returned. A job whose result is ignored
        returns None at once. While the result backend is away it is waited for.
        """
        if isinstance(result, ResultSet):
            waits = [asyncio.ensure_future(self.wait(one, timeout_s, propagate=propagate)) for one in result.results]
            try:
                return [await wait for wait in waits]
            finally:
                for wait in waits:
                    wait.cancel()
                # Nobody else looks at what the others raise.
                await asyncio.gather(*waits, return_exceptions=True)
        if not isinstance(result, ResultBase):
            raise InvalidArguments(f"result: expected what delay() returns, or a group's result, not {result!r}")
        if not isinstance(result, EagerResult) and not result.ignored and result._cache is None:
            let_go(result)
            await self._wait_for_end(result, _family(result) if propagate else [], timeout_s)
        return result.get(propagate=propagate, follow_parents=False, disable_sync_subtasks=False)

    def watch(self, result: AsyncResult) -> Watch:
        """Return what asks whether a job has ended, in the running event loop, until it is closed."""
        return Watch(self._asker(), result)

    def _asker(self) -> _Asker:
        loop = asyncio.get_running_loop()
        if (asker := self._askers.get(loop)) is None:
            # An asker's task holds its loop, so weak references would keep both.
            for closed in [each for each in list(self._askers) if each.is_closed()]:
                self._askers.pop(closed, None)
            asker = self._askers[loop] = _Asker(self._source)
        return asker

    async def _wait_for_end(self, result: AsyncResult, before: Sequence[AsyncResult], timeout_s: float | None) -> None:
        loop, asker = asyncio.get_running_loop(), self._asker()
        waits = {asker.ask(one.id): one for one in (*before, result)}
        deadline_s = None if timeout_s is None else loop.time() + timeout_s
        try:
            while result._cache is None:
                left_s = None if deadline_s is None else max(0.0, deadline_s - loop.time())
                done, _ = await asyncio.wait(
                    [wait for wait in waits if not wait.done()], timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    raise CeleryTimeout("The operation timed out.")
                for wait in done:
                    waits[wait]._maybe_set_cache(wait.result())
                for one in before:
                    if one._cache is not None:
                        one.maybe_throw()
        finally:
            for wait, one in waits.items():
                asker.forget(one.id, wait)

    @asynccontextmanager
    async def _source(self) -> AsyncIterator[Read]:
        """Where results are read, while the block lasts."""
        backend = self._app.backend
        if not isinstance(backend, RedisBackend):
            yield self._read_in_thread
            return
        async with connect_async(self._app.conf.result_backend, sentinel_master=self._sentinel_master) as client:

            async def read(ids: Sequence[str]) -> Metas:
                found = await client.mget([backend.get_key_for_task(job_id) for job_id in ids])
                return {job_id: backend.decode_result(raw) for job_id, raw in zip(ids, found, strict=True) if raw}

            yield read

    async def _read_in_thread(self, ids: Sequence[str]) -> Metas:
        # Other backends have no client for asyncio: a thread asks for what is due, and does not wait for it.
        def read() -> Metas:
            return {job_id: self._app.backend.get_task_meta(job_id, cache=False) for job_id in ids}

        return await asyncio.to_thread(read)


class Watch:
    """Asks whether one job has ended, from the first look on."""

    def __init__(self, asker: _Asker, result: AsyncResult) -> None:
        self._asker, self._result = asker, result
        self._wait: Future[Mapping[str, Any]] | None = None

    def look(self) -> None:
        """Let the result know how the job has ended, if it has. Raises what keeps results from being read."""
        if self._wait is None:
            self._wait = self._asker.ask(self._result.id)
        if self._wait.done():
            self._result._maybe_set_cache(self._wait.result())

    def hurry(self) -> None:
        """Ask often from now on: it is about to end."""
        self.look()
        self._asker.hurry(self._result.id)

    def close(self) -> None:
        """Ask no more. Safe to repeat."""
        if self._wait is not None:
            self._asker.forget(self._result.id, self._wait)


@dataclass(slots=True)
class _Wanted:
    since_s: float
    due_s: float
    waits: list[Future[Mapping[str, Any]]] = field(default_factory=list)


class _Asker:
    """Asks in one event loop, for as long as somebody waits there."""

    def __init__(self, source: Callable[[], Any]) -> None:
        self._source = source
        self._wanted: dict[str, _Wanted] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def ask(self, job_id: str) -> Future[Mapping[str, Any]]:
        """Return what will be stored of a job, once it has ended."""
        loop = asyncio.get_running_loop()
        wait: Future[Mapping[str, Any]] = loop.create_future()
        now_s = loop.time()
        self._wanted.setdefault(job_id, _Wanted(now_s, now_s)).waits.append(wait)
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="results")
        return wait

    def hurry(self, job_id: str) -> None:
        """Ask for a job as often as if somebody had just begun to wait for it."""
        if (wanted := self._wanted.get(job_id)) is not None:
            wanted.since_s = wanted.due_s = asyncio.get_running_loop().time()
            self._changed.set()

    def forget(self, job_id: str, wait: Future[Mapping[str, Any]]) -> None:
        """Let nobody wait for it any more."""
        wait.cancel()
        wanted = self._wanted.get(job_id)
        if wanted is not None and wait in wanted.waits:
            wanted.waits.remove(wait)
            if not wanted.waits:
                del self._wanted[job_id]

    async def _run(self) -> None:
        try:
            # Somebody may begin to wait while the connection is closed.
            while self._wanted:
                async with self._source() as read:
                    while await self._is_wanted():
                        await self._ask_for_due(read)
        except Exception as exc:  # noqa: BLE001 - those who wait raise it
            for wait in self._take_all():
                wait.set_exception(exc)
        finally:
            # Nobody would answer them: the loop ends.
            for wait in self._take_all():
                wait.cancel()

    def _take_all(self) -> list[Future[Mapping[str, Any]]]:
        waits = [wait for wanted in self._wanted.values() for wait in wanted.waits if not wait.done()]
        self._wanted.clear()
        return waits

    async def _is_wanted(self) -> bool:
        """Sleep until something is to be asked for; False: nobody waits any more."""
        self._changed.clear()
        due_s = min((wanted.due_s for wanted in self._wanted.values()), default=None)
        pause_s = LINGER_S if due_s is None else due_s - asyncio.get_running_loop().time()
        if pause_s > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), pause_s)
            except TimeoutError:
                return due_s is not None
        return True

    async def _ask_for_due(self, read: Read) -> None:
        loop = asyncio.get_running_loop()
        # What is due a little later is asked for along with the rest.
        soon_s = loop.time() + SOONEST_S
        due = list(islice((job_id for job_id, wanted in self._wanted.items() if wanted.due_s <= soon_s), AT_ONCE))
        if not due:
            return
        try:
            metas = await read(due)
        except (redis.RedisError, OSError) as exc:
            logger.warning("results cannot be read, those who wait go on waiting: %r", exc)
            metas, away_s = {}, AWAY_S
        else:
            away_s = 0.0
        now_s = loop.time()
        for job_id in due:
            if (wanted := self._wanted.get(job_id)) is None:
                continue
            meta = metas.get(job_id)
            if meta is not None and meta["status"] in states.READY_STATES:
                del self._wanted[job_id]
                for wait in wanted.waits:
                    if not wait.done():
                        wait.set_result(meta)
            else:
                pause_s = min(max((now_s - wanted.since_s) * SHARE, SOONEST_S), LATEST_S)
                wanted.due_s = now_s + max(pause_s, away_s)


def _family(result: AsyncResult) -> list[AsyncResult]:
    """The jobs before a job in its chain whose errors end it, the first one first."""
    found: list[AsyncResult] = []
    for node in result._parents():
        found += node.results if isinstance(node, ResultSet) else [node]
    return [one for one in reversed(found) if isinstance(one, AsyncResult) and not one.ignored]


def let_go(result: Any) -> None:
    """End the subscription to a result that Celery has made when the job was sent, unless somebody waits in it.

    Through it would come what nobody takes from it.
    """
    if isinstance(result, EagerResult):
        return
    backend = result.backend
    is_waited_for = any(result.id in results for results in getattr(backend, "_pending_results", ()))
    if not is_waited_for and (fulfilled := getattr(backend, "on_result_fulfilled", None)) is not None:
        fulfilled(result)
