"""Jobs that were sent one by one and wait together on a node: they are handed to the pool as one, and end one by one.

Each is a delivery and a request of its own. What they share is one call of their task's ``together``; then each is run
by Celery's tracer, which finds its answer there instead of running the task.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from billiard.einfo import ExceptionInfo
from celery import current_app
from celery.app.trace import trace_task_ret
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError
from kombu.asynchronous import get_event_loop
from kombu.serialization import loads, prepare_accept_content

from cluster_tasks.broker import deliveries
from cluster_tasks.errors import InvalidArguments
from cluster_tasks.tasks.base import ClusterTask, answering
from workers.members import SLICE_S, given_back

if TYPE_CHECKING:
    from workers.request import ClusterRequest

logger = logging.getLogger(__name__)

Call = tuple[str, str, dict[str, Any], Any, str, str]
"""What Celery's tracer takes: name of the task, id, request, body, and how that is encoded."""
Outcome = tuple[int, Any, float]
"""What it returns: whether the job failed, its result or error, seconds."""


def trace_batch(calls: Sequence[Call]) -> list[Outcome]:
    """Run jobs of one task, all in one call where that can be; return how each of them ended. Runs in the pool.

    Those that are to be given back have not ended: they would be run in what is left of the time of all.
    """
    begun_s, outcomes = time.monotonic(), list[Outcome]()
    # The time of all may be over in their call, or between two of them: it is the error of none.
    with suppress(SoftTimeLimitExceeded):
        answers = _answers(calls)
        known = set(answers)
        with answering(answers):
            for call in calls:
                is_late = call[1] not in known and time.monotonic() - begun_s > SLICE_S
                outcomes.append(given_back(begun_s) if is_late else trace_task_ret(*call))
    return [*outcomes, *(given_back(begun_s) for _ in calls[len(outcomes) :])]


def _answers(calls: Sequence[Call]) -> dict[str, Any]:
    """What each job ends with, by its id; those that are missing are run by themselves."""
    app = current_app._get_current_object()
    task = app.tasks[calls[0][0]]
    accept = prepare_accept_content(app.conf.accept_content)
    given: dict[str, Any] = {}
    for _, job_id, _, body, content_type, encoding in calls:
        try:
            args, kwargs, _ = loads(body, content_type, encoding, accept=accept) if content_type else body
            given[job_id] = task.named_arguments(args, kwargs)
        except InvalidArguments:
            continue
        except Exception as exc:  # noqa: BLE001 - whatever decoders raise; by itself it fails with that
            logger.debug("the arguments of job %s cannot be read: %r", job_id, exc)
    if len(given) < 2:
        return {}
    try:
        values = type(task).together(app, list(given.values()))
    except SoftTimeLimitExceeded:
        raise
    except Exception as exc:  # noqa: BLE001 - one of them is to blame, and alone it fails alone
        logger.info("%d jobs of %s are run one after the other: %r", len(given), task.name, exc)
        return {}
    if len(values) != len(given):
        logger.error("%s: %d jobs done together gave %d results", task.name, len(given), len(values))
        return {}
    return dict(zip(given, values, strict=True))


class Batch:
    """Requests that are handed to the pool as one."""

    def __init__(self, first: ClusterRequest, task: ClusterTask) -> None:
        self.requests = [first]
        self.wait_s, self._most = task.batch_wait_s, task.batch
        self._stopped: set[str] = set()

    @property
    def is_full(self) -> bool:
        """Whether no more may be added."""
        return len(self.requests) >= self._most

    def execute(self, pool: Any, **_: Any) -> Any:
        """Hand them to the pool, those that may begin. Raises TaskRevokedError if none may."""
        requests = self.requests = [request for request in self.requests if not request.revoked()]
        if not requests:
            raise TaskRevokedError("none of the jobs of a batch may begin")
        if (node := deliveries.current()) is not None:
            # The one that has filled their place may be gone.
            node.put_alone(requests[0].delivery_tag)
        if len(requests) == 1:
            return requests[0].execute_alone(pool)
        for request in requests:
            request.batch = self
        result = pool.apply_async(
            trace_batch,
            args=([request.call for request in requests],),
            accept_callback=self.on_accepted, timeout_callback=self.on_timeout,
            callback=self.on_outcomes, error_callback=self.on_failure,
            correlation_id=requests[0].id,
        )  # fmt: skip
        for request in requests:
            request._apply_result = result and ref(result)
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A process or thread has begun with them."""
        for request in self.requests:
            request.on_accepted(pid, time_accepted)

    def on_outcomes(self, outcomes: list[Outcome] | ExceptionInfo, **kwargs: Any) -> None:
        """All have been run; or, where the pool has no processes, one has told it to exit."""
        if isinstance(outcomes, ExceptionInfo):
            outcomes = [outcomes] * len(self.requests)
        pairs = zip(self.requests, outcomes, strict=True)
        _for_each(partial(request.on_success, outcome) for request, outcome in pairs)

    def on_failure(self, exc_info: Any, **kwargs: Any) -> None:
        """The process that ran them is gone."""
        _for_each(partial(request.on_failure, exc_info, **kwargs) for request in self.requests)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The time limit of the node is over, which is one of each and not of all."""
        for request in self.requests:
            request.on_timeout(soft, timeout)

    def stop(self, job_id: str) -> bool:
        """Stop one of them; return whether all are to be stopped, as only their process can be."""
        self._stopped.add(job_id)
        return self._stopped >= {request.id for request in self.requests}


def _for_each(steps: Iterable[Callable[[], Any]]) -> None:
    """Do all steps, and raise the first error then: one job must not keep the others from their ends."""
    errors = []
    for step in steps:
        try:
            step()
        except Exception as exc:  # noqa: BLE001 - it is raised below
            errors.append(exc)
    if errors:
        raise errors[0]


class Batches:
    """Those of this node that are not with the pool yet. For the thread of the event loop."""

    def __init__(self) -> None:
        self._new: list[Batch] = []
        """Of what is being read."""
        self._waiting: dict[str, Batch] = {}
        """Those that wait for more, by task."""
        self._hand_over: Callable[[Any], Any] = lambda request: None

    def gather(self, consumer: Any) -> None:
        """Take the requests that ``consumer`` would hand to the pool one by one."""
        self._hand_over, consumer.on_task_request = consumer.on_task_request, self._take

    def _take(self, request: Any) -> None:
        node = deliveries.current()
        if node is None or not getattr(request, "can_be_in_a_batch", False):
            self._hand_over(request)
            return
        name, tag = request.name, request.delivery_tag
        last = self._new[-1] if self._new and self._new[-1].requests[0].name == name else None
        if node.is_beside(tag) and last is not None and not last.is_full:
            last.requests.append(request)
        elif (waiting := self._waiting.get(name)) is not None and not waiting.is_full:
            waiting.requests.append(request)
            node.put_beside(tag)
        else:
            node.put_alone(tag)
            self._new.append(Batch(request, request.task))

    def all_read(self) -> None:
        """Hand over what need not wait for more."""
        for name, batch in list(self._waiting.items()):
            if batch.is_full:
                self._end_wait(name, batch)
        new, self._new = self._new, []
        for batch in new:
            name, hub = batch.requests[0].name, get_event_loop()
            if batch.is_full or not batch.wait_s or hub is None or name in self._waiting:
                self._execute(batch)
            else:
                self._waiting[name] = batch
                hub.call_later(batch.wait_s, self._end_wait, name, batch)

    def _end_wait(self, name: str, batch: Batch) -> None:
        if self._waiting.get(name) is batch:
            del self._waiting[name]
            self._execute(batch)

    def _execute(self, batch: Batch) -> None:
        # Celery waits until the pool has room for a request; this one stands for all.
        first = batch.requests[0]
        first.execute_using_pool = batch.execute
        self._hand_over(first)

    def clear(self) -> None:
        """Forget them: the connection broke, and what had not begun is delivered again."""
        self._new.clear()
        self._waiting.clear()


batches = Batches()
"""Of this process."""
