"""Many jobs of one task sent at once, many in a message, and their results read at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

from celery import Celery, states
from celery.exceptions import TimeoutError as NotInTime
from celery.result import assert_will_not_block
from celery.utils import uuid

from cluster_tasks.broker.members import MEMBERS_HEADER, named
from cluster_tasks.errors import InvalidArguments, PartlySubmitted, PayloadTooLarge
from cluster_tasks.tasks.base import ClusterTask

MOST_MEMBERS = 256
MOST_BYTES = 192 * 1024
"""Of the arguments in one message, which is a third longer."""
NEEDS_ONE_EACH = ("time_limit", "soft_time_limit", "queue", "exchange", "routing_key")
"""Options of a task for which Celery looks at a message, or by which it may go to others than nodes."""
READ_AT_ONCE = 512
_told = json.JSONEncoder(default=repr).encode
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.005, 0.1
"""Between two looks at results that are not there yet."""


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Submitted(Sequence[Any]):
    """The results of jobs that were sent together, in their order; each is a Celery ``AsyncResult``."""

    def __init__(self, task: Any, ids: Sequence[str], sent_alone: Mapping[int, Any], ignored: bool) -> None:
        self.ids = tuple(ids)
        self._task, self._ignored, self._sent_alone = task, ignored, sent_alone
        self._results = dict(sent_alone)
        """Those that were made, by place."""
        self._ends: dict[int, dict[str, Any]] = {}
        """What was stored, by place."""

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self._result(each) for each in range(len(self))[place]]
        return self._result(range(len(self))[place])

    def _result(self, place: int) -> Any:
        if (result := self._results.get(place)) is None:
            # A job costs less without one.
            result = self._results[place] = self._task.AsyncResult(self.ids[place])
            result.ignored = self._ignored
            if place in self._ends:
                result._set_cache(self._ends[place])
        return result

    def ready(self) -> bool:
        """Whether all have ended. Raises redis.RedisError."""
        waiting = self._waiting()
        chunks = (waiting[start : start + READ_AT_ONCE] for start in range(0, len(waiting), READ_AT_ONCE))
        return not any(self._look(places) for places in chunks)

    def get(
        self, timeout: float | None = None, propagate: bool = True, disable_sync_subtasks: bool = True
    ) -> list[Any]:
        """Wait for all, and return what they returned, in their order; None for jobs whose results are ignored.

        Raises the error of a job that failed, of the first that is found; with ``propagate=False`` it is returned in
        its place. Raises ``celery.exceptions.TimeoutError`` after ``timeout`` seconds, redis.RedisError.
        """
        if disable_sync_subtasks:
            assert_will_not_block()
        until_s = None if timeout is None else time.monotonic() + timeout
        waiting, wait_s = self._waiting(), SHORTEST_WAIT_S
        if propagate:
            self._throw(self._ends)
        while waiting:
            places = waiting[:READ_AT_ONCE]
            left = self._look(places)
            waiting[: len(places)] = left
            if propagate:
                self._throw(set(places).difference(left))
            if left:
                if until_s is not None and time.monotonic() >= until_s:
                    raise NotInTime(f"{len(waiting)} of {len(self)} jobs have not ended after {timeout:g} s")
                time.sleep(wait_s)
                wait_s = SHORTEST_WAIT_S if len(left) < len(places) else min(2 * wait_s, LONGEST_WAIT_S)
        return [self._ends[place]["result"] if place in self._ends else None for place in range(len(self))]

    def forget(self) -> None:
        """Delete the results. Raises redis.RedisError."""
        for start in range(0, len(self), READ_AT_ONCE):
            self._task.backend.client.delete(*self._keys[start : start + READ_AT_ONCE])

    @cached_property
    def _keys(self) -> list[bytes]:
        return list(map(self._task.backend.get_key_for_task, self.ids))

    def _waiting(self) -> list[int]:
        """The places of those of which no end is known."""
        if self._ignored:
            return []
        for place, result in self._results.items():
            if result._cache is not None:
                self._ends.setdefault(place, result._cache)
        return [place for place in range(len(self)) if place not in self._ends]

    def _look(self, places: Sequence[int]) -> list[int]:
        """Look for results in one round trip; return the places of those that are not there."""
        backend, left = self._task.backend, []
        stored = backend.mget([self._keys[place] for place in places])
        for place, payload in zip(places, stored, strict=True):
            if payload is None or (meta := backend.decode_result(payload))["status"] not in states.READY_STATES:
                left.append(place)
                continue
            self._ends[place] = meta
            if place in self._results:
                self._results[place]._set_cache(meta)
            if place in self._sent_alone:
                # Celery listens for it.
                self._sent_alone[place].on_ready(self._sent_alone[place])
        return left

    def _throw(self, places: Iterable[int]) -> None:
        for place in places:
            if self._ends[place]["status"] in states.PROPAGATE_STATES:
                self._result(place).maybe_throw()

    def __repr__(self) -> str:
        return f"<{len(self)} jobs of {self._task.name}>"


def submit(task: ClusterTask, arguments: Iterable[Any], slots: int, **options: Any) -> Submitted:
    """Send a job for each of ``arguments``, spread over ``slots`` of nodes.

    Raises InvalidArguments, and sends nothing, if one of them cannot be right; PartlySubmitted if it cannot send all.
    """
    calls = [_call(task, number, each) for number, each in enumerate(arguments)]
    options = {name: value for name, value in options.items() if value is not None}
    options = {"ignore_result": task.ignore_result, **options}
    most = min(MOST_MEMBERS, -(-len(calls) // max(slots, 1))) if _can_share_messages(task) else 1
    ids: list[str] = []
    known: dict[int, Any] = {}
    left = list(_chunks(calls, most))[::-1]
    try:
        # The next one is the last.
        while left:
            chunk = left.pop()
            if len(chunk) == 1:
                known[len(ids)] = result = task.apply_async(*chunk[0], **options)
                ids.append(result.id)
                continue
            try:
                ids += _send(task, chunk, options)
            except PayloadTooLarge:
                # Of the app's limit; it may be that of none of them.
                half = len(chunk) // 2
                left += [chunk[half:], chunk[:half]]
    except Exception as exc:
        if not ids:
            raise
        sent = Submitted(task, ids, known, options["ignore_result"])
        raise PartlySubmitted(f"{len(ids)} of {len(calls)} jobs were sent, then: {exc!r}", sent) from exc
    return Submitted(task, ids, known, options["ignore_result"])


def _call(task: ClusterTask, number: int, given: Any) -> _Call:
    call = (
        _Call((), dict(given))
        if isinstance(given, Mapping)
        else _Call(given if isinstance(given, tuple) else (given,), {})
    )
    try:
        task.check_arguments(*call)
    except InvalidArguments as exc:
        raise InvalidArguments(f"job {number}: {exc}") from None
    return call


def _can_share_messages(task: ClusterTask) -> bool:
    """Whether one message may be of many jobs: not where each needs what Celery does for a message."""
    app, kind = task.app, type(task)
    options = task._get_exec_options()
    return not (
        app.conf.task_always_eager
        or not task.rerun_on_crash
        or kind.instead is not None
        or task.rate_limit
        or any(options.get(name) for name in NEEDS_ONE_EACH)
        or (options.get("serializer") or app.conf.task_serializer) != "json"
        or not hasattr(app.backend, "ends_together")
    )


def _chunks(calls: Sequence[_Call], most: int) -> Iterator[list[_Call]]:
    chunk: list[_Call] = []
    size = 0
    for call in calls:
        length = len(_told(call)) if most > 1 else 0
        if chunk and (len(chunk) == most or size + length > MOST_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(call)
        size += length
    if chunk:
        yield chunk


def _send(task: ClusterTask, calls: Sequence[_Call], options: Mapping[str, Any]) -> list[str]:
    app: Celery = task.app
    ids = [uuid() for _ in calls]
    headers = {MEMBERS_HEADER: named(ids), "ignore_result": options["ignore_result"]}
    # Celery would listen for a result of the message, which has none.
    given = {**task._get_exec_options(), **options, "ignore_result": True, "headers": headers}
    app.send_task(
        task.name, tuple(calls), {}, task_type=task, add_to_parent=False, argsrepr=f"<{len(calls)} jobs>",
        kwargsrepr="{}", **given,
    )  # fmt: skip
    return ids
