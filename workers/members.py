"""How the members of one message are run: as one call where their task can, else one after the other.

This runs where Celery's tracer does, in a process or thread of the pool. Each member that is run alone goes through
that tracer, as a job of its own does: its arguments, its errors and its retries are its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import current_app, signals, states
from celery.app.task import Context
from celery.app.trace import TraceInfo, report_internal_error, task_has_custom, trace_task
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from kombu.exceptions import OperationalError as UnpublishableError
from kombu.serialization import loads, prepare_accept_content

from cluster_tasks.broker.members import member_ids, member_request
from cluster_tasks.broker.message import Delivery
from cluster_tasks.broker.together import Ends, HadEnded
from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import ClusterError, EndNotStored, InvalidArguments, StaleCommit
from cluster_tasks.tasks.base import ClusterTask, expiry

logger = logging.getLogger(__name__)

SLICE_S = 1.0
"""After so long no other is begun by itself: the rest goes to all nodes, and each has the time of a job of its own."""
_NOT_RUN = object()
HANDLERS = ("before_start", "on_success", "after_return")


class Member(NamedTuple):
    """One job of a message."""

    id: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def trace_members(
    name: str, message_id: str, request: dict[str, Any], body: Any, content_type: str, content_encoding: str
) -> tuple[int, Any, float]:
    """Run the members of a message; stands for Celery's ``trace_task_ret``, and returns what that does.

    Told as rejected, the message is to be given back: some members have not come to an end here.
    """
    app, begun_s = current_app._get_current_object(), time.monotonic()
    task = app.tasks[name]
    try:
        if content_type:
            accept = prepare_accept_content(app.conf.accept_content)
            calls, _, embedded = loads(body, content_type, content_encoding, accept=accept)
        else:
            calls, _, embedded = body
        request = {**request, **(embedded or {}), "is_eager": False}
        members = [Member(job_id, *call) for job_id, call in zip(member_ids(request), calls, strict=True)]
        is_done = _Run(task, request).run(message_id, members)
    except SoftTimeLimitExceeded:
        # Of the time of all, in their call or between two of them: it is the error of none.
        is_done = False
    except Exception as exc:  # noqa: BLE001 - as Celery's does: it goes to the process that asked
        return 1, report_internal_error(task, exc), time.monotonic() - begun_s
    if is_done:
        return 0, f"<{len(members)} jobs>", time.monotonic() - begun_s
    return given_back(begun_s)


def given_back(begun_s: float) -> tuple[int, Any, float]:
    """Return what Celery's tracer returns of a message that is to be given back, because it has not ended here."""
    try:
        raise Reject("it has not ended here", requeue=True)
    except Reject:
        return 1, ExceptionInfo(internal=True), time.monotonic() - begun_s


class _Run:
    def __init__(self, task: Any, request: dict[str, Any]) -> None:
        self._task, self._request = task, request
        self._delivery = Delivery.of(request["properties"])
        self._expires_at = expiry(request.get("expires"))

    def run(self, message_id: str, members: Sequence[Member]) -> bool:
        """Return whether all have ended. Raises StaleCommit, EndNotStored, redis.RedisError."""
        if self._delivery is None:
            raise ClusterError(f"the message {message_id} of several jobs came from no list of a cluster")
        # Nobody is told of a success that is not committed, by a signal or an event.
        with self._task.backend.ends_together(self._delivery, message_id, one_by_one=True) as ends:
            try:
                is_done = self._run(ends, members)
                ends.tell(last=is_done)
            except (StaleCommit, EndNotStored):
                raise
            except BaseException:
                # What has ended is not run again.
                with suppress(StaleCommit, EndNotStored):
                    ends.tell()
                raise
            return is_done

    def _run(self, ends: Ends, members: Sequence[Member]) -> bool:
        begun_s, is_done = time.monotonic(), True
        alone = self._together(ends, list(self._to_be_run(members)))
        for member in alone:
            # What was fetched together has waited meanwhile.
            if self._has_expired():
                self._revoke(member, "expired")
            elif time.monotonic() - begun_s > SLICE_S:
                return False
            elif not self._run_alone(member):
                is_done = False
        return is_done

    def _to_be_run(self, members: Sequence[Member]) -> Iterator[Member]:
        """Those that have neither ended nor gone on as their own retry; those that were revoked end here."""
        cluster = cluster_of(self._task.app)
        keys, ids = cluster.keys, [member.id for member in members]
        with cluster.client.pipeline(transaction=False) as pipe:
            pipe.mget([keys.terminal(job_id) for job_id in ids])
            pipe.zmscore(keys.revoked, ids)
            if self._request["delivery_info"].get("redelivered"):
                for job_id in ids:
                    pipe.exists(keys.followed(job_id))
            ended, revoked_at, *followed = pipe.execute()
        for member, has_ended, revoked, is_followed in zip(
            members, ended, revoked_at, followed or [0] * len(ids), strict=True
        ):
            if has_ended or is_followed:
                continue
            if revoked is not None:
                self._revoke(member, "revoked")
            elif self._has_expired():
                self._revoke(member, "expired")
            else:
                yield member

    def _has_expired(self) -> bool:
        return self._expires_at is not None and time.time() > self._expires_at

    def _revoke(self, member: Member, reason: str) -> None:
        task, context = self._task, self._context(member)
        logger.info("Discarding revoked task: %s[%s]", task.name, member.id)
        try:
            task.backend.mark_as_revoked(member.id, reason, request=context, store_result=self._stores_errors)
        except HadEnded:
            return
        is_expired = reason == "expired"
        signals.task_revoked.send(task, request=context, terminated=False, signum=None, expired=is_expired)

    def _together(self, ends: Ends, members: list[Member]) -> list[Member]:
        """Run members as one call, and return those that are to be run alone."""
        task = self._task
        if not (isinstance(task, ClusterTask) and type(task).together and len(members) > 1):
            return members
        if any(task_has_custom(task, handler) for handler in HANDLERS):
            return members
        alone, fitting, given = [], [], []
        for member in members:
            try:
                given.append(task.named_arguments(member.args, member.kwargs))
                fitting.append(member)
            except InvalidArguments:
                alone.append(member)
        done = dict[str, Any]()
        for member, value in zip(fitting, self._call(given), strict=True):
            if value is _NOT_RUN or isinstance(value, self._for_celery):
                alone.append(member)
            elif isinstance(value, Exception):
                self._fail(member, value)
            else:
                done[member.id] = value
        self._succeed(ends, [member for member in fitting if member.id in done], done)
        return alone

    @property
    def _for_celery(self) -> tuple[type[BaseException], ...]:
        """Errors that do not just fail a job."""
        return (Retry, Ignore, Reject, *(getattr(self._task, "autoretry_for", None) or ()))

    def _call(self, given: list[dict[str, Any]]) -> Sequence[Any]:
        if len(given) < 2:
            return [_NOT_RUN] * len(given)
        try:
            values = type(self._task).together(self._task.app, given)
        except SoftTimeLimitExceeded:
            raise
        except Exception as exc:  # noqa: BLE001 - one of them is to blame, and alone it fails alone
            logger.info("%d jobs of %s are run one after the other: %r", len(given), self._task.name, exc)
            return [_NOT_RUN] * len(given)
        if len(values) != len(given):
            raise ClusterError(f"{self._task.name}: {len(given)} jobs run together gave {len(values)} results")
        return values  # type: ignore[no-any-return]

    def _succeed(self, ends: Ends, members: Sequence[Member], values: Mapping[str, Any]) -> None:
        task = self._task
        # What Celery calls extended tells of each job by itself.
        groups = [[member] for member in members] if task.app.conf.result_extended else [members]
        failed: dict[str, Exception] = {}
        for group in filter(None, groups):
            results = {member.id: values[member.id] for member in group}
            failed |= task.backend.mark_members_as_done(results, self._context(group[0]), not self._ignores_result)
        ends.tell()
        for member in members:
            if member.id in failed:
                self._fail(member, failed[member.id])
            elif member.id not in ends.refused and signals.task_success.receivers:
                self._tell_success(member, values[member.id])

    def _tell_success(self, member: Member, value: Any) -> None:
        self._task.push_request(**vars(self._context(member)))
        try:
            signals.task_success.send(sender=self._task, result=value)
        finally:
            self._task.pop_request()

    def _fail(self, member: Member, error: Exception) -> None:
        try:
            raise error
        except Exception as exc:  # noqa: BLE001 - Celery looks at what is on its way
            with suppress(HadEnded):
                TraceInfo(states.FAILURE, exc).handle_error_state(self._task, self._context(member))

    def _run_alone(self, member: Member) -> bool:
        """Run a member as a job of its own; return whether it was dealt with."""
        request = member_request(self._request, member.id, (member.args, member.kwargs))
        result, info, _, _ = trace_task(self._task, member.id, member.args, member.kwargs, request, app=self._task.app)
        if info is None or not isinstance(result, ExceptionInfo):
            return True
        error = result.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        if isinstance(error, HadEnded):
            return True
        if not isinstance(error, Reject):
            if result.internal and info.state == states.FAILURE:
                raise error
            return True
        if isinstance(error.reason, StaleCommit | EndNotStored | UnpublishableError):
            # Of a retry that could not be published.
            raise error.reason
        if not error.requeue:
            with suppress(HadEnded):
                self._task.backend.mark_as_failure(
                    member.id, error, request=Context(request), store_result=self._stores_errors
                )
        return not error.requeue

    def _context(self, member: Member) -> Context:
        return Context(member_request(self._request, member.id, (member.args, member.kwargs)))

    @property
    def _ignores_result(self) -> bool:
        asked = self._request.get("ignore_result")
        return bool(self._task.ignore_result if asked is None else asked)

    @property
    def _stores_errors(self) -> bool:
        return not self._ignores_result or bool(self._task.store_errors_even_if_ignored)
