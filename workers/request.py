"""Celery's request, for what nodes take from the cluster's lists: whether a job may start, and how it ends."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from datetime import datetime
from functools import cache, partial
from traceback import format_exception
from typing import Any
from weakref import ref

import redis
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery import states
from celery.app.trace import TraceInfo, report_internal_error, trace_ok_t
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError, TimeLimitExceeded
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import revoked as revoked_jobs
from celery.worker.state import task_ready
from kombu.exceptions import EncodeError
from kombu.exceptions import OperationalError as UnpublishableError

from cluster_tasks.broker import deliveries
from cluster_tasks.broker.deliveries import Deliveries, Past
from cluster_tasks.broker.members import member_ids
from cluster_tasks.broker.message import BATCH_PROPERTY, INTERRUPTED, Delivery
from cluster_tasks.broker.sequels import attempt_of, complete, has_ended
from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.errors import (
    ClusterError,
    EndNotStored,
    NodeLost,
    OutOfMemory,
    QuarantinedError,
    StaleCommit,
    UnavailableError,
)
from cluster_tasks.metrics.counts import Outcome
from workers.batches import Batch, Call
from workers.counting import counts, type_of, waited_s
from workers.load import outcomes
from workers.members import trace_members

logger = logging.getLogger(__name__)

BROKEN_MESSAGE = TypeError, ValueError, LookupError, AttributeError, EncodeError
"""What comes of a message whose callbacks are none: delivered again, it would come again."""
CALLING = frozenset({"celery.map", "celery.starmap", "celery.chunks"})
"""Tasks of Celery that call another one for each item of a list."""


class ClusterRequest(Request):  # type: ignore[misc]
    """A job on its way through a node. What came from other queues is Celery's own request and nothing else."""

    _task: Any
    _eta: Any
    _delivery: Delivery | None = None
    _was_delayed = _is_let_go_here = _failed = _is_ending = False
    _stop_process: Callable[[int, int], object] | None = None
    _letting_go: Callable[[], None] | None = None
    _accepted_s: float | None = None
    _erred = _has_members = _is_interrupted = False
    _jobs = 1
    _outcome: Outcome | None = Outcome.SUCCEEDED
    """How it ends, as far as is known; None: not here."""
    _due: datetime | None = None
    batch: Batch | None = None
    """With which it was handed to the pool."""

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        node, self._delivery = deliveries.current(), Delivery.of(message.properties)
        if node is None or self._delivery is None:
            return
        # It has waited in Redis until its time came; the task still reads the time in its own request.
        self._due, self._eta = self._eta, None
        self._was_delayed = self._due is not None
        # Celery puts its own in a subclass.
        self.on_success = self._on_outcome
        if not self._task.acks_late:
            # That subclass remembers that the task would be let go when it begins.
            self._task, self._is_let_go_here = _late(self._task), True
        if self._task.rate_limit:
            node.hold_back(self._delivery.tag)
        if members := member_ids(self._request_dict):
            # Each of them expires by itself, and is revoked by itself.
            self._expires, self.execute_using_pool = None, self._execute_members
            self._has_members, self._jobs = True, len(members)
        elif not self.can_be_in_a_batch:
            node.put_alone(self._delivery.tag)

    # Before it starts.

    def revoked(self) -> bool:
        """Whether it must not start, for whatever reason: Celery asks this before it hands a job to the pool."""
        node = deliveries.current()
        if node is None or self._delivery is None:
            return bool(super().revoked())
        try:
            # That it was revoked, or has expired, may be an end that cannot be stored now.
            return super().revoked() or not self._may_start(node, self._delivery.tag)
        except (redis.RedisError, UnavailableError) as exc:
            logger.warning("job %s waits: %s", self.id, exc)
            return not self._let_lie(node, self._delivery.tag)

    def _may_start(self, node: Deliveries, tag: str) -> bool:
        if not node.may_start(tag):
            return self._let_lie(node, tag)
        # Only these can have a past, and to look it up is a round trip.
        if self._was_delayed or self._delivery_info["redelivered"]:
            past = node.past(self.id)
            if past.revoked:
                revoked_jobs.add(self.id)
                return not super().revoked()
            if any(attempt > attempt_of(self._context) for attempt in past.attempts):
                # It is on its way as its own retry or replacement.
                self._outcome = None
                task_ready(self)
                self.acknowledge()
                return False
            if past.ended or (error := self._verdict(node, tag, past)):
                self._end_without_running(node, None if past.ended else error)
                return False
            if past.crashes:
                node.note_receipt(self.id, past.crashes, begun=True)
        node.take_up(tag)
        # Each of these may have waited for Redis longer than this node can be sure of its lease.
        return node.may_start(tag) or self._let_lie(node, tag)

    def _let_lie(self, node: Deliveries, tag: str, *, has_run: bool = False) -> bool:
        """Do not start it now: it may belong to others already. If it does not, it is delivered again."""
        task_ready(self)
        node.let_lie(tag, has_run=has_run)
        self.acknowledged = True
        return False

    def _verdict(self, node: Deliveries, tag: str, past: Past) -> ClusterError | None:
        """The error with which a job fails that must not be run again, after the crashes of its past."""
        reruns = getattr(self._running, "rerun_on_crash", True)
        if not reruns and (self._message.delivery_info or {}).get(INTERRUPTED):
            return NodeLost("its node gave it back, and may have begun it by then; it is not to be run twice")
        if not reruns and node.has_run(tag):
            return NodeLost("it has run, and its end could not be stored; it is not to be run twice")
        if not past.crashes:
            return None
        cluster: Cluster = cluster_of(self._app)
        if len(past.crashes) >= cluster.settings.max_crash_deliveries and not past.crashes[-1].shared:
            kept = cluster.quarantine.put(self.id, self._type, node.message(tag), past.crashes)
            logger.error("job %s[%s] is in quarantine: %s", self.name, self.id, kept.reason)
            return QuarantinedError(kept.reason)
        if not reruns:
            last = past.crashes[-1]
            return NodeLost(f"it ran on {last.node} when that happened: {last.reason}; it is not to be run twice")
        return None

    @property
    def _running(self) -> Any:
        """The task whose function runs: of map, starmap and chunks the one that they call; None if it is not known."""
        if self._task.name in CALLING:
            # In a message from elsewhere it may be anything.
            match self.kwargs:
                case {"task": {"task": str() as name}}:
                    return self._app.tasks.get(name)
        return self._task

    def _end_without_running(self, node: Deliveries, error: ClusterError | None) -> None:
        """End it as failed by Celery's own path, or (None) complete the end to which it has come already."""
        task_ready(self)
        with self._letting_go_last():
            self.acknowledge()
            if error is None:
                self._outcome = None
                complete(self._task.backend, self._context)
                node.forget(self.id)
                return
            self._failed = True
            self._outcome = Outcome.QUARANTINED if isinstance(error, QuarantinedError) else Outcome.FAILED
            try:
                raise error
            except ClusterError:
                info = TraceInfo(states.FAILURE, error).handle_error_state(self._task, self._context)
            self.send_event("task-failed", exception=repr(error), traceback=info.traceback)

    def _execute_members(self, pool: Any, **_: Any) -> Any:
        """In the place of Celery's: the message of several jobs is handed to the pool."""
        if self.revoked():
            raise TaskRevokedError(self.id)
        time_limit, soft_time_limit = self.time_limits
        result = pool.apply_async(
            trace_members,
            args=(self.type, self.id, self.request_dict, self.body, self.content_type, self.content_encoding),
            accept_callback=self.on_accepted, timeout_callback=self.on_timeout,
            callback=self.on_success, error_callback=self.on_failure,
            soft_timeout=soft_time_limit or self._task.soft_time_limit, timeout=time_limit or self._task.time_limit,
            correlation_id=self.id,
        )  # fmt: skip
        self._apply_result = result and ref(result)
        return result

    # With others that wait here.

    @property
    def can_be_in_a_batch(self) -> bool:
        """Whether it may be handed to the pool with others of its task."""
        # What was with a node before may be what ended its process, and goes alone. Limits of the task may be known to
        # this node only, as those that it is told by remote control.
        task, limits = self._task, (*self.time_limits, self._task.time_limit, self._task.soft_time_limit)
        return bool(
            self._delivery is not None
            and getattr(task, "batch", 1) > 1
            and self._message.properties.get(BATCH_PROPERTY)
            and not self._delivery_info.get("redelivered")
            and not (task.rate_limit or any(limits))
        )

    def execute_alone(self, pool: Any) -> Any:
        """Hand it to the pool by itself. Raises TaskRevokedError."""
        # Celery puts its own in a subclass; that of this request is the batch's.
        request_cls: Any = type(self)
        return request_cls.execute_using_pool(self, pool)

    @property
    def call(self) -> Call:
        """What its tracer takes."""
        return self.type, self.id, self.request_dict, self.body, self.content_type, self.content_encoding

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End its process, unless that runs other jobs as well."""
        if self.batch is None:
            super().terminate(pool, signal)
        else:
            logger.warning("job %s[%s] is not terminated: its process runs others as well", self.name, self.id)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Cancel it, unless its process runs other jobs as well."""
        if self.batch is None:
            super().cancel(pool, signal, emit_retry)

    # When others have been given its job.

    @property
    def delivery_tag(self) -> str:
        """Of its delivery; empty if it came from a queue that is not the cluster's."""
        return self._delivery.tag if self._delivery is not None else ""

    def stop(self, stop_process: Callable[[int, int], object]) -> None:
        """End the process that runs it, now or when one begins; its end is nobody's business. From any thread.

        ``stop_process`` is given the process id and a signal.
        """
        self._stop_process = stop_process
        is_last = self.batch is None or self.batch.stop(self.id)
        if self.time_start and is_last:
            # What it would do when it is asked to end, the others' run may be doing at the same time.
            stop_process(self.worker_pid, signal.SIGKILL)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A process has begun it: one that was to be stopped meanwhile is ended."""
        self._accepted_s = time_accepted
        if self.batch is not None:
            self._jobs = len(self.batch.requests)
        super().on_accepted(pid, time_accepted)
        if self._stop_process is not None and (self.batch is None or self.batch.stop(self.id)):
            self._stop_process(pid, signal.SIGKILL)

    def _is_over(self) -> bool:
        """Whether it was stopped: then it has come to its end here, and to none for the cluster."""
        if self._stop_process is None or self._delivery is None or (node := deliveries.current()) is None:
            return False
        self._let_lie(node, self._delivery.tag)
        return True

    # How it ends.

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """End it as its error says: failed, tried again, charged with a crash; given back if that cannot be stored."""
        if self._is_over():
            return None
        exc = exc_info.exception
        exc = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
        if isinstance(exc, MemoryError):
            # Of the task, which may go on in a node that has memory again; Celery would end the worker.
            exc = exc_info.exception = OutOfMemory(str(exc) or repr(exc))
        if isinstance(exc, Reject) and isinstance(exc.reason, StaleCommit | EndNotStored | UnpublishableError):
            # Of a retry that could not be published, which Celery takes for the end of the job.
            exc_info.internal, exc = True, exc.reason
        if exc_info.internal and not isinstance(exc, Reject | Ignore):
            self._on_end_not_stored(exc)
            return None
        if self._shares_time and isinstance(exc, TimeLimitExceeded):
            self._give_its_own_time_to_each()
            return None
        self._failed, self._erred = not isinstance(exc, Retry | Ignore), not isinstance(exc, Ignore)
        self._outcome = _outcome_of(exc)
        if isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt):
            self._charge(str(exc) or repr(exc), exc_info.traceback or "")
        with self._letting_go_last():
            if isinstance(exc, Retry) and self._delivery is not None and self._context.chord:
                # One that was revoked meanwhile is not tried again, and nobody but us knows its chord.
                complete(self._task.backend, self._context)
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _success_was_stored(self) -> Any:
        stored = super()._success_was_stored()
        if stored and self._delivery is not None and not has_ended(self._task.backend, self.id):
            # Its task told so before the end, and may have had more to do.
            return False
        if stored:
            self._outcome = Outcome.SUCCEEDED
        if stored and self._delivery is not None:
            # Celery takes the job for done, but its process may have died before it told its chord.
            complete(self._task.backend, self._context)
        return stored

    def _charge(self, reason: str, traceback: str) -> None:
        # A service manager sends its SIGTERM to the processes of the pool as well: they do not die of their jobs.
        # (What is set is the exit code, and 0 is one.)
        is_ending = any(
            asked is not None and asked is not False for asked in (state.should_stop, state.should_terminate)
        )
        node = deliveries.current()
        if not self.time_start or self._delivery is None or node is None:
            return
        if is_ending:
            self._is_interrupted = True
        else:
            logger.warning("job %s[%s] is charged with a crash: %s", self.name, self.id, reason)
            node.blame(self._delivery.tag, reason, traceback, shared=self.batch is not None)

    def _on_end_not_stored(self, exc: Exception) -> None:
        """Its end was refused, or could not be stored: then it must be delivered again."""
        task_ready(self)
        self._failed, node = True, deliveries.current()
        if self._delivery is None or node is None:
            logger.warning("job %s[%s]: %s", self.name, self.id, exc)
            self.acknowledge()
            return
        if isinstance(exc, StaleCommit):
            with self._letting_go_last():
                self._on_refused(exc)
            return
        logger.error("the end of job %s[%s] is not stored, it will be delivered again: %r", self.name, self.id, exc)
        if isinstance(exc, EndNotStored | redis.ConnectionError | redis.TimeoutError | UnpublishableError):
            self._let_lie(node, self._delivery.tag, has_run=True)
        else:
            # Nothing that passes: it would be run again without end, if that were not counted.
            told = "".join(format_exception(exc))
            node.blame(self._delivery.tag, f"its end could not be stored: {exc!r}", told)
            self.reject(requeue=True)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """End it as failed; of jobs that share a call, give each its own time."""
        if self._is_over():
            return
        if self._shares_time and not soft:
            logger.warning("%s[%s]: jobs took %g s together, now each has its own time", self.name, self.id, timeout)
            task_ready(self)
            self.reject(requeue=True)
            return
        self._failed = self._erred = not soft
        if not soft:
            self._outcome = Outcome.FAILED
        with self._letting_go_last():
            super().on_timeout(soft, timeout)

    @property
    def _shares_time(self) -> bool:
        return self._has_members or self.batch is not None

    def _give_its_own_time_to_each(self) -> None:
        """Together the jobs of a message were over the time limit, which is one of each. Safe to repeat."""
        task_ready(self)
        if not self.acknowledged:
            logger.warning("the jobs of %s[%s] were over their time limit, they go on one by one", self.name, self.id)
            self.reject(requeue=True)

    def _announce_revoked(self, *args: Any) -> None:
        self._outcome = Outcome.REVOKED
        with self._letting_go_last():
            super()._announce_revoked(*args)
        self._already_revoked = True

    def _on_outcome(self, outcome: Any, **kwargs: Any) -> None:
        if self._is_over():
            return
        if isinstance(outcome, ExceptionInfo):
            # So threads and solo tell of an exit of the task, which is the death of a process where there are some.
            self.on_failure(outcome)
            return
        request_cls: Any = type(self)
        request_cls.on_success(self, outcome, **kwargs)
        if self._is_let_go_here:
            self.acknowledge()

    @contextmanager
    def _letting_go_last(self) -> Iterator[None]:
        """Let go of the delivery when all is done: the commit of an end is checked against it.

        A commit that is refused is the end of the matter as well: the job has ended elsewhere, or will.
        """
        if self._is_ending:
            yield
            return
        self._is_ending = True
        try:
            try:
                yield
            except StaleCommit as exc:
                self._on_refused(exc)
        except BaseException as exc:
            node, self._letting_go = deliveries.current(), None
            if self._delivery is None or node is None:
                raise
            if not isinstance(exc, BROKEN_MESSAGE):
                # The end is not stored: let go of, the job would be lost.
                self._let_lie(node, self._delivery.tag, has_run=bool(self.time_start))
                raise
            logger.exception("the end of job %s[%s] cannot be told: its message is set aside", self.name, self.id)
            self._letting_go = partial(node.set_aside, self._delivery.tag)
        finally:
            self._is_ending = False
            if self._letting_go is not None:
                self._letting_go()

    def _on_refused(self, exc: StaleCommit) -> None:
        logger.warning("job %s[%s]: %s", self.name, self.id, exc)
        self._outcome = Outcome.REFUSED
        self._letting_go = self._letting_go or self.acknowledge
        # Who ended it elsewhere may not know what follows: one who revoked it does not.
        with suppress(StaleCommit):
            complete(self._task.backend, self._context)

    def acknowledge(self) -> None:
        """Let go of the delivery, and count how it ended; while it is ending, when that is done."""
        if self._is_ending:
            self._letting_go = self.acknowledge
            return
        if not self.acknowledged:
            outcomes.record(not self._failed)
            self._count()
            self._record_run()
        super().acknowledge()

    def _count(self) -> None:
        if self._delivery is None or self._outcome is None:
            return
        kind, started_s = type_of(self._task), self._accepted_s
        if started_s is None:
            counts.ended(kind, self._outcome)
        else:
            waited = waited_s(self._message.properties, self._due, started_s)
            counts.ended(kind, self._outcome, time.monotonic() - started_s, waited)

    def _record_run(self) -> None:
        node, delivery = deliveries.current(), self._delivery
        if self._accepted_s is None or delivery is None or node is None or not node.is_of_trial(delivery.tag):
            return
        took_s = (time.monotonic() - self._accepted_s) / self._jobs
        outcomes.record_run(self._task.name, not self._erred, took_s, node.trial)

    def reject(self, requeue: bool = False) -> None:
        """Give the delivery back with ``requeue``, else let go of it; while it is ending, when that is done."""
        if self._is_ending:
            self._letting_go = partial(self.reject, requeue)
            return
        if not (requeue or self.acknowledged):
            self._count()
        node = deliveries.current()
        if requeue and (self._has_members or self._is_interrupted) and self._delivery is not None and node is not None:
            # Who is given it next splits the message of several jobs, and does not run what must not run twice.
            node.requeue(self._delivery.tag, interrupted=True)
            self.acknowledged = True
            return
        super().reject(requeue)


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, Retry):
        return Outcome.RETRIED
    return Outcome.REPLACED if isinstance(error, Ignore) else Outcome.FAILED


def keeping_errors_in(task: Any) -> Callable[..., Any]:
    """The tracer of a task, returning the errors that it raises.

    Celery's lets an error in the storing of a result, such as a refused commit, out of a thread of the pool, whose job
    then comes to no end, and in solo out of the worker.
    """
    trace = task.__trace__

    def trace_and_tell(*args: Any) -> Any:
        try:
            return trace(*args)
        except Reject:
            raise
        except Exception as exc:  # noqa: BLE001 - as Celery itself does where a pool has processes
            return trace_ok_t(report_internal_error(task, exc), TraceInfo(states.FAILURE, exc), 0.0, None)

    return trace_and_tell


@cache
def _late(task: Any) -> Any:
    """A task as it is run from the cluster's lists: what is let go when it begins is lost in a crash."""
    late = copy(task)
    late.acks_late = late.reject_on_worker_lost = True
    return late
