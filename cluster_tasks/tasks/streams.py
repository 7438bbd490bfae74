"""``stream(generate, "Why?")``: the text of a job while it is made, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, EagerResult, assert_will_not_block

from cluster_tasks.awaiting import let_go
from cluster_tasks.errors import BrokerUnavailable, StreamRestarted
from cluster_tasks.redis_store import connect_async, foreign_errors
from cluster_tasks.redis_store import text as decoded
from cluster_tasks.streaming.entries import AT_ONCE, GONE, READ, READER_LIVES_S
from cluster_tasks.streaming.reading import Chunk, Event, Finished, Reading, Restarted
from cluster_tasks.tasks.apps import cluster_of, sending_app
from cluster_tasks.tasks.base import STREAM_HEADER, ClusterTask

__all__ = ["Chunk", "Finished", "Restarted", "TextStream", "follow", "stream"]

BLOCK_S = 1.0
"""The longest that a reader waits at Redis before it tells that it is there, and looks whether the job has ended."""
SOON_S = 0.02
"""The same when the attempt has come to its end; then twice as long each time."""
OUTAGE_S = 15.0
"""For so long Redis may not answer before a reader raises."""
AWAY_S = 0.5
"""After that it is asked again."""


def stream(
    task: ClusterTask, /, *args: Any, cancel_after_s: float | None = None, timeout_s: float | None = None,
    options: Mapping[str, Any] | None = None, **kwargs: Any,
) -> TextStream:  # fmt: skip
    """Send a job, as ``task.delay(*args, **kwargs)`` does, and return what reads its text while it is made.

    ``cancel_after_s`` ends the job as revoked once nobody has read for so long; None: it goes on without a reader.
    ``timeout_s`` is the longest that a reader waits for something new, None: no limit. ``options`` are those of
    ``apply_async``. Raises what ``delay`` raises, and ValueError for a ``cancel_after_s`` that is not above 0, or a job
    whose result is ignored: nothing would tell that it has ended.
    """
    if cancel_after_s is not None and not 0 < cancel_after_s < math.inf:
        raise ValueError(f"cancel_after_s={cancel_after_s!r}: expected seconds above 0, or None")
    asked, options = {"cancel_after_s": cancel_after_s}, dict(options or {})
    if options.get("ignore_result", task.ignore_result):
        raise ValueError(f"{task.name}: a job whose result is ignored cannot be read")
    options["headers"] = {**(options.get("headers") or {}), STREAM_HEADER: asked}
    job = task.apply_async(args, kwargs, **options)
    let_go(job)
    return TextStream(job, task.app, "", timeout_s)


def follow(
    job: AsyncResult | str, after: str = "", *, timeout_s: float | None = None, app: Celery | None = None
) -> TextStream:
    """Read the text of a job that was sent by ``stream``, maybe in another process: by its id, or its result.

    ``after`` is the id of the last chunk that was read. Raises ValueError if it can be none.
    """
    app = app or (job.app if isinstance(job, AsyncResult) else sending_app())
    return TextStream(app.AsyncResult(job) if isinstance(job, str) else job, app, after, timeout_s)


class TextStream:
    """The text of a job, to be read once, by one reader: ``for text in …``, or ``async for text in …``.

    The pieces, joined, are the text of the job's result. Where a second attempt at the job makes void what was read,
    StreamRestarted is raised; read on, and the text comes from its beginning. ``events`` and ``events_async`` yield
    ``Restarted`` instead, ``Chunk``, whose ``id`` is for ``follow``, and at last ``Finished`` with the result.

    All raise what ``get`` of the job's result raises, celery.exceptions.TimeoutError, and BrokerUnavailable after a
    longer outage of Redis; then, too, one can read on.
    """

    def __init__(self, job: AsyncResult, app: Celery, after: str, timeout_s: float | None) -> None:
        self.job = job
        """Its result, as ``delay`` returns it."""
        self.last_id = after
        """The id of the last chunk that was read."""
        self.result: Any = None
        """What the job has returned; None before ``Finished``."""
        self._cluster, self._timeout_s = cluster_of(app), timeout_s
        self._reading, self._events = Reading(after), deque[Event]()
        self._is_over = False
        self._beat = 0
        self._block_s, self._heard_at_s, self._new_at_s = 0.0, time.monotonic(), time.monotonic()

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if isinstance(event, Restarted):
                raise self._restarted()
            if isinstance(event, Chunk):
                yield event.text

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        async with aclosing(self.events_async()) as events:
            async for event in events:
                if isinstance(event, Restarted):
                    raise self._restarted()
                if isinstance(event, Chunk):
                    yield event.text

    def events(self) -> Iterator[Event]:
        """Yield what happens until the job has ended. Blocks the thread meanwhile, and so must not be used in a job."""
        assert_will_not_block()
        client = self._cluster.client
        self._begin()
        while True:
            yield from self._take_events()
            if self._is_over:
                return
            if self._is_known():
                self._finish()
                continue
            try:
                with self._reading_errors():
                    with client.pipeline(transaction=False) as pipe:
                        self._ask(pipe)
                        has_new = self._take(pipe.execute())
                    if not has_new:
                        self.job._maybe_set_cache(self.job.backend.get_task_meta(self.job.id, cache=False))
            except BrokerUnavailable as exc:
                time.sleep(self._bear(exc))

    async def events_async(self) -> AsyncGenerator[Event, None]:
        """Yield what happens until the job has ended; no thread is blocked. Holds a connection to Redis meanwhile."""
        settings = self._cluster.settings
        url, master = settings.broker_url.get_secret_value(), settings.sentinel_master
        self._begin()
        ending = self._cluster.awaiting.watch(self.job)
        try:
            # It connects when it is used.
            async with connect_async(url, sentinel_master=master) as client:
                while True:
                    for event in self._take_events():
                        yield event
                    if self._is_over:
                        return
                    if self._is_known():
                        self._finish()
                        continue
                    try:
                        with self._reading_errors():
                            async with client.pipeline(transaction=False) as pipe:
                                self._ask(pipe)
                                has_new = self._take(await pipe.execute())
                    except BrokerUnavailable as exc:
                        await asyncio.sleep(self._bear(exc))
                        continue
                    if has_new and self._reading.is_ending:
                        ending.hurry()
                    if not has_new:
                        ending.look()
        finally:
            ending.close()

    def cancel(self) -> None:
        """End the job as revoked, now if it waits, at its next piece of text if it runs. Raises BrokerUnavailable."""
        with self._reading_errors(), self._cluster.client.pipeline() as pipe:
            key = self._cluster.keys.stream_reader(self.job.id)
            pipe.hset(key, GONE, 1)
            pipe.expire(key, READER_LIVES_S)
            pipe.execute()
        self.job.revoke()

    # What is the same with and without asyncio.

    def _take_events(self) -> Iterator[Event]:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Chunk | Finished):
                self.last_id = event.id
            if isinstance(event, Finished):
                self.result, self._is_over = event.result, True
            yield event
            # The reader may have taken his time.
            self._begin()

    def _begin(self) -> None:
        self._heard_at_s = self._new_at_s = time.monotonic()

    def _is_known(self) -> bool:
        """Whether the result is here, be it good or bad."""
        return isinstance(self.job, EagerResult) or self.job._cache is not None

    def _finish(self) -> None:
        result = self.job.get(follow_parents=False, disable_sync_subtasks=False)
        self._events += [*self._reading.finish(_text_of(result)), Finished(result)]

    def _restarted(self) -> StreamRestarted:
        return StreamRestarted(f"job {self.job.id} was begun again: its text is read from the beginning")

    @contextmanager
    def _reading_errors(self) -> Iterator[None]:
        with foreign_errors(BrokerUnavailable, f"reading the text of job {self.job.id}"):
            yield

    def _bear(self, outage: BrokerUnavailable) -> float:
        """Return how long to wait after an error of Redis, or raise it: it has lasted too long."""
        if time.monotonic() - self._heard_at_s > OUTAGE_S:
            raise outage
        return AWAY_S

    def _ask(self, pipe: Any) -> None:
        """Tell how far it is read, wait for something new, and read that, in one round trip."""
        keys, job_id, position = self._cluster.keys, self.job.id, self._reading.position
        self._beat += 1
        pipe.hset(keys.stream_reader(job_id), READ, f"{position} {self._beat}")
        pipe.expire(keys.stream_reader(job_id), READER_LIVES_S)
        if self._block_s:
            # It only waits: what it returns looks otherwise in each version of Redis' protocol.
            pipe.xread({keys.stream(job_id): position}, count=1, block=max(1, int(self._block_s * 1000)))
        pipe.xrange(keys.stream(job_id), min=f"({position}", count=AT_ONCE)

    def _take(self, replies: Sequence[Any]) -> bool:
        """Take the replies to that; return whether there was something new. Raises celery.exceptions.TimeoutError."""
        now_s = self._heard_at_s = time.monotonic()
        entries = [(decoded(entry_id), fields) for entry_id, fields in replies[-1]]
        self._events += self._reading.take(entries)
        if entries:
            self._new_at_s = now_s
        elif self._timeout_s is not None and now_s - self._new_at_s >= self._timeout_s:
            raise CeleryTimeout("The operation timed out.")
        if not self._reading.is_ending:
            self._block_s = BLOCK_S
        else:
            self._block_s = SOON_S if entries else min(max(2 * self._block_s, SOON_S), BLOCK_S)
        if self._timeout_s is not None:
            self._block_s = min(self._block_s, max(self._timeout_s - (now_s - self._new_at_s), 0.0))
        return bool(entries)


def _text_of(result: Any) -> str | None:
    """The text of the result of a job; None if it has none."""
    text = result.get("text") if isinstance(result, Mapping) else result
    return text if isinstance(text, str) else None
