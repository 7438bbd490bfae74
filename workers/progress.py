"""Whether a worker that beats still works: what has to move is watched, and what stands still for too long is named."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any

from celery.worker import state

from cluster_tasks.broker.deliveries import Deliveries
from workers.executions import Executions

LOOK_EVERY_S = 1.0
RECONNECTING_S = 60.0
"""How much longer an event loop may take that connects: Celery waits up to 30 s between two attempts."""

STACK_SHOWN = 8
"""Calls, the last ones."""


class Stall:
    """How long a mark has stood still, as seen by an observer that may be held up itself. Pure.

    What happened between two looks is not known: a gap of any length, of a process that was stopped or had not the GIL,
    counts as ``step_s`` at most.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._mark: Hashable = None
        self._seen_s = self._still_s = 0.0

    def look(self, mark: Hashable, now_s: float) -> float:
        """Return for how many seconds ``mark`` has not changed; None: there is no reason why it should."""
        moved = mark is None or mark != self._mark
        self._still_s = 0.0 if moved else self._still_s + min(now_s - self._seen_s, self._step_s)
        self._mark, self._seen_s = mark, now_s
        return self._still_s


class Stalls:
    """The same for many marks at a time, each of which is there or gone. Pure."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._known: dict[Hashable, Stall] = {}

    def look(self, marks: Collection[Hashable], now_s: float) -> float:
        """Return for how many seconds the one has been there that is there longest."""
        self._known = {mark: self._known.get(mark) or Stall(self._step_s) for mark in marks}
        return max((stall.look(True, now_s) for stall in self._known.values()), default=0.0)


@dataclass(slots=True)
class Pulse:
    """What the event loop counts up while it turns."""

    turns: int = 0

    def beat(self) -> None:
        """Count one up."""
        self.turns += 1


class Progress:
    """Watches event loop, consumer, pool and heartbeat of one worker. ``look`` is called again and again.

    A loop of solo within a task is at work. While beats do not get through, Redis is away and the loop may wait for
    it. A consumer that was cancelled, or whose slots are full, has nothing to fetch.
    """

    def __init__(self, worker: Any, register: Deliveries, executions: Executions, pulse: Pulse) -> None:
        self._worker, self._register, self._executions, self._pulse = worker, register, executions, pulse
        self._conf = worker.app.conf
        self._runs_inline = type(worker.pool).__module__.endswith(".solo")
        step_s = 2 * LOOK_EVERY_S
        self._beats, self._loop, self._fetches = Stall(step_s), Stall(step_s), Stall(step_s)
        self._untouched = Stalls(step_s)

    def look(self, beats: int, now_s: float, stuck_s: float) -> str:
        """Return what has made no progress for ``stuck_s``, or nothing. ``beats`` counts attempts to beat."""
        sure, connected = self._register.is_sure(), self._worker.consumer.connection is not None
        turns = self._pulse.turns if sure and self._pulse.turns and not self._is_in_a_task() else None
        fetches = self._register.fetches_answered if turns and connected and self._wants_jobs() else None
        given = self._not_taken_up() if sure else ()
        # Celery's soft shutdown sleeps in the thread of the loop.
        turn_s = stuck_s + self._conf.worker_soft_shutdown_timeout + (0 if connected else RECONNECTING_S)
        # Celery itself ends processes that take longer to get ready.
        begin_s = stuck_s + self._conf.worker_proc_alive_timeout
        found = (
            ("the heartbeat has not tried to beat", self._beats.look(beats, now_s), stuck_s),
            ("the event loop has not turned", self._loop.look(turns, now_s), turn_s),
            ("the consumer has fetched nothing", self._fetches.look(fetches, now_s), stuck_s),
            ("the pool has not begun a job that it was given", self._untouched.look(given, now_s), begin_s),
        )
        return next((f"{what} for {still_s:.0f} s" for what, still_s, limit_s in found if still_s > limit_s), "")

    def _is_in_a_task(self) -> bool:
        return self._runs_inline and bool(state.active_requests)

    def _wants_jobs(self) -> bool:
        """Whether the loop should be fetching now."""
        consumer = self._worker.consumer.task_consumer
        if consumer is None or consumer.channel is None or not consumer.consuming_from(self._register.queue):
            return False
        return bool(consumer.channel.qos.can_consume())

    def _not_taken_up(self) -> Collection[str]:
        # A pool under -O fast writes a job to a child that is at work, though another is free.
        slots = 1 if self._worker.optimization == "fast" else self._worker.pool.num_processes
        free = len(state.active_requests) < slots
        return self._executions.not_taken_up() if free and not self._runs_inline else ()


def stack_of(thread_id: int) -> str:
    """Return where a thread is, as the end of a traceback does."""
    frame = sys._current_frames().get(thread_id)
    return "".join(traceback.format_stack(frame)[-STACK_SHOWN:]) if frame else "the thread has ended"
