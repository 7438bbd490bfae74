"""The base class of tasks that the cluster balances."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cached_property, partial, wraps
from typing import Any, ClassVar

import redis
from celery import Task, states
from celery.canvas import Signature, _chain, _chord
from celery.exceptions import Ignore
from celery.utils import uuid
from kombu.exceptions import OperationalError
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster_tasks.broker.hedging import HEDGE_PROPERTY
from cluster_tasks.broker.members import MEMBERS_HEADER
from cluster_tasks.broker.message import Delivery
from cluster_tasks.errors import ConfigurationError, InvalidArguments, StaleCommit, StreamAbandoned
from cluster_tasks.keys import Keys
from cluster_tasks.model import check_request_type
from cluster_tasks.settings import ClusterSettings
from cluster_tasks.streaming.publishing import Origin, Publisher
from cluster_tasks.tasks.apps import cluster_of

logger = logging.getLogger(__name__)

RESULT_ONLY = frozenset({"task_id", "ignore_result", "priority", "expires", "shadow", "argsrepr", "kwargsrepr"})
"""Options of a call that wants nothing but the result of its job."""
REPLACEABLE = frozenset({"task_id", "priority", "expires"})
"""Options of a call that can be passed on to other jobs."""
STREAM_HEADER = "cluster_stream"
"""The header of a job whose text is to be streamed, and how."""
MOST_IN_BATCH, MOST_BATCH_WAIT_S = 256, 1.0
_publisher: ContextVar[Publisher | None] = ContextVar("publisher", default=None)
_answers: ContextVar[dict[str, Any] | None] = ContextVar("answers", default=None)
_NONE = object()
Affinity = str | Callable[..., str | None] | None


class ClusterTask(Task):  # type: ignore[misc]
    """A task whose jobs go to the best node and survive the death of any.

    ``request_type`` says which nodes may run it. ``affinity`` names the argument that jobs share when they profit
    from the same node, or is a function of the task's arguments; none: any node is as good. ``arguments`` is a
    pydantic model of the arguments: what does not fit it is refused in the caller with InvalidArguments, and fails the
    job where no caller could know, as in a chain; the task gets the values as the model has parsed them.
    """

    abstract = True
    request_type: ClassVar[str] = "any"
    affinity: ClassVar[Affinity] = None
    arguments: ClassVar[type[BaseModel] | None] = None
    known: ClassVar[Callable[..., Any] | None] = None
    """A function of the app and the task's arguments that returns the result of a job if that is known already, from a
    cache for instance, else None. A job whose result is known is not sent: its caller gets the result."""
    instead: ClassVar[Callable[..., Signature | None] | None] = None
    """A function of the app, the time when a job expires (seconds since 1970, or None), its priority and the task's
    arguments, that returns what is sent in the place of a job and ends with its result, else None."""
    prefers: ClassVar[Callable[..., str | None] | None] = None
    """A function of the app and the task's arguments that names the node which a job is best sent to, if it can be
    given jobs; None: the strategy chooses. Any node may take the job all the same."""
    together: ClassVar[Callable[..., Sequence[Any]] | None] = None
    """A function of the app and a list of the arguments of several jobs, a mapping by name for each, that does them all
    in one call. It returns their results in the same order, for a job that failed the exception. If it raises, each is
    run by itself."""
    batch: ClassVar[int] = 1
    """Up to so many jobs that wait on a node are done ``together``, each of which was sent by itself."""
    batch_wait_s: ClassVar[float] = 0.0
    """So long a node waits for more of them before it begins with fewer; 0: it takes what waits already."""
    rerun_on_crash: ClassVar[bool] = True
    """Whether a job is run again when its node or process died while it ran. If not, it fails with NodeLost."""
    run: Callable[..., Any]
    _called: Callable[..., Any] | None = None
    """What runs, without what is done here before."""

    Request = "workers.request:ClusterRequest"
    # check_arguments does this, and knows when not to.
    typing = False
    # Results are answers and documents: logs, events and Flower do not show them.
    resultrepr_maxsize = 0

    def __init__(self) -> None:
        super().__init__()
        self._called = self.run
        if self.arguments is not None:
            self.run = self._parsing(self.run)
        if type(self).together is not None:
            self.run = self._answering(self.run)

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Check what the task declares, and have its jobs acknowledged late. Raises ValueError."""
        super().on_bound(app)
        check_request_type(cls.request_type)
        _check_batch(cls)
        # Whatever the task says: a job that is let go when it begins is lost in a crash. One that must not be run
        # twice sets rerun_on_crash.
        cls.acks_late = cls.reject_on_worker_lost = True
        # A crash is counted as such, and spends none of the job's retries.
        cls.retry_on_worker_lost = False

    @property
    def settings(self) -> ClusterSettings:
        """The settings of the app's cluster. Raises ClusterError if it is in none, ConfigurationError."""
        return cluster_of(self.app).settings

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.run)

    @cached_property
    def _by_place_or_name(self) -> tuple[tuple[str, ...], frozenset[str]] | None:
        """The names of all parameters, and of those that are needed; None if one is not positional-or-keyword."""
        parameters = self._signature.parameters.values()
        if any(one.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for one in parameters):
            return None
        needed = frozenset(one.name for one in parameters if one.default is inspect.Parameter.empty)
        return tuple(one.name for one in parameters), needed

    @cached_property
    def _signature_of_decorator(self) -> inspect.Signature:
        """What is called may take other arguments than the function that it wraps: it may add some."""
        return inspect.signature(self._called or self.run, follow_wrapped=False)

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Send the job. Raises InvalidArguments, naming the field, if the arguments cannot be right.

        A job whose result is ``known`` is over when this returns, unless more is wanted than its result: a chain, a
        group, a chord, links, a queue or a time.
        """
        # Celery names the parent of what follows a job (links, chains): its arguments are a result, there is
        # no caller, and to raise now would lose the result of that job too. The job itself will fail.
        if options.get("parent_id") is None:
            bound = self.check_arguments(args or (), kwargs or {})
            if not rest and _wanted(options) <= RESULT_ONLY and (result := self._known_result(bound, **options)):
                return result
            if not rest and options.keys() <= REPLACEABLE and (result := self._sent_instead(bound, **options)):
                return result
        # Arguments are prompts and documents: logs, events and Flower see their sizes only.
        options.setdefault("argsrepr", _sizes(args or ()))
        options.setdefault("kwargsrepr", _sizes(kwargs or {}))
        return super().apply_async(args, kwargs, *rest, **options)

    def _known_result(self, bound: inspect.BoundArguments, task_id: str | None = None, **options: Any) -> Any:
        """Return the result of a job that need not be sent, stored as if it had been run; None: it must be."""
        known = type(self).known
        if known is None or self.app.conf.task_always_eager:
            return None
        value = known(self.app, **self._given(bound))
        if value is None:
            return None
        result = self.AsyncResult(task_id or uuid())
        if options.get("ignore_result", self.ignore_result):
            result.ignored = True
            return result
        try:
            store = (
                self.backend.store_result if task_id else getattr(self.backend, "store_new", self.backend.store_result)
            )
            store(result.id, value, states.SUCCESS)
        except (redis.RedisError, OperationalError) as exc:
            logger.debug("a known result could not be stored, its job is sent: %r", exc)
            return None
        result._set_cache({"task_id": result.id, "status": states.SUCCESS, "result": value, "traceback": None})
        return result

    def _sent_instead(
        self, bound: inspect.BoundArguments, task_id: str | None = None, expires: Any = None,
        priority: int | None = None,
    ) -> Any:  # fmt: skip
        """Send what stands for a job, and return its result; None: nothing does."""
        instead = type(self).instead
        if instead is None or self.app.conf.task_always_eager:
            return None
        signature = instead(self.app, expiry(expires), priority, **self._given(bound))
        return None if signature is None else _alone(signature.apply_async(task_id=task_id or uuid()))

    def _given(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        given = dict(bound.arguments)
        if self._by_place_or_name is None or bound.signature is not self._signature:
            given |= given.pop(_rest_of_arguments(bound.signature), {})
        return given

    @property
    def fencing_token(self) -> int:
        """A number that grows with every delivery of a job, for effects outside of the cluster.

        A store that keeps the highest token it has seen with each thing, and refuses lower ones, is safe from what a
        node still does that was taken for dead. 0 in a job that came from no list of the cluster.
        """
        delivery = Delivery.of(getattr(self.request, "properties", None))
        return delivery.fencing_token if delivery else 0

    def delivery_check(self) -> Callable[[], None]:
        """Return what raises StaleCommit once this job was taken from its node, in whatever thread it is called.

        For effects that cannot compare a ``fencing_token``: done under a lock, after this was called under it, they
        come before whatever another does under that lock for the same job, or after it. Silent while Redis is, as
        locks are.
        """
        delivery = Delivery.of(getattr(self.request, "properties", None))
        if delivery is None:
            return lambda: None
        around = cluster_of(self.app).neighbourhood
        unacked, job_id = around.keys.unacked(delivery.node_id, delivery.epoch), self.request.id

        def check() -> None:
            try:
                stands = around.client.hexists(unacked, delivery.tag)
            except redis.RedisError as exc:
                logger.warning("not known whether the delivery of %s still stands: %r", job_id, exc)
                return
            if not stands:
                raise StaleCommit(f"{job_id} was taken from {delivery.node_id}: it must not change anything any more")

        return check

    @contextmanager
    def streaming(self) -> Iterator[Publisher | None]:
        """Give what the text of this job is written to while it is made, in pieces; None: nobody wants to read it.

        When the block ends, the job is to return that text, or a mapping with it as ``text``. A job that is cancelled
        by its reader is ended as revoked. A job that runs another one itself within its block streams for it.
        """
        if (publisher := _publisher.get()) is not None or (publisher := self._new_publisher()) is None:
            yield publisher
            return
        token = _publisher.set(publisher)
        try:
            with publisher:
                yield publisher
        except StreamAbandoned as exc:
            request = self.request
            is_stored = not (request.ignore_result or self.ignore_result)
            self.backend.mark_as_revoked(request.id, str(exc), request=request, store_result=is_stored)
            raise Ignore(str(exc)) from exc
        finally:
            _publisher.reset(token)

    def _new_publisher(self) -> Publisher | None:
        asked = self.request.get(STREAM_HEADER)
        delivery = Delivery.of(getattr(self.request, "properties", None))
        if not isinstance(asked, Mapping) or delivery is None:
            return None
        around = cluster_of(self.app).neighbourhood
        unacked = around.keys.unacked(delivery.node_id, delivery.epoch)
        origin = Origin(self.request.id, unacked, delivery.tag, delivery.fencing_token)
        return Publisher(around.client, around.keys, around.clock, origin, asked.get("cancel_after_s"))

    def named_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, as ``check_arguments``, with those of ``**`` among them."""
        return self._given(self.check_arguments(args, kwargs))

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Return the arguments by name, as ``arguments`` has parsed them. Raises InvalidArguments."""
        bound = self._bound(args, kwargs)
        if self.arguments is not None:
            given, parsed = bound.arguments, vars(validate_arguments(self.name, self.arguments, bound.arguments))
            given.update({name: parsed[name] for name in given.keys() & parsed.keys()})
        return bound

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        if self._by_place_or_name is not None:
            # What bind does, in a fifth of its time; to say what is wrong is left to it.
            names, needed = self._by_place_or_name
            given: dict[str, Any] = dict(zip(names, args, strict=False))
            given.update((name, kwargs[name]) for name in names[len(args) :] if name in kwargs)
            if len(given) == len(args) + len(kwargs) and given.keys() >= needed:
                return inspect.BoundArguments(self._signature, given)
        try:
            return self._signature.bind(*args, **kwargs)
        except TypeError as exc:
            # A model names the arguments of the function itself.
            if self.arguments is None:
                with suppress(TypeError):
                    return self._signature_of_decorator.bind(*args, **kwargs)
            raise InvalidArguments(f"{self.name}: {exc}") from None

    def _parsing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def run_parsed(*args: Any, **kwargs: Any) -> Any:
            bound = self.check_arguments(args, kwargs)
            return run(*bound.args, **bound.kwargs)

        return run_parsed

    def _answering(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def run_or_answer(*args: Any, **kwargs: Any) -> Any:
            answer = (_answers.get() or {}).pop(self.request.id, _NONE)
            if answer is _NONE:
                return run(*args, **kwargs)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return run_or_answer

    def batch_of(self, options: Mapping[str, Any]) -> str:
        """How many jobs can be done with one that is sent so, and a name that they share; empty: none."""
        headers = options.get("headers") or {}
        is_one = not (MEMBERS_HEADER in headers or STREAM_HEADER in headers or HEDGE_PROPERTY in options)
        limits = options.get("time_limit"), options.get("soft_time_limit"), self.time_limit, self.soft_time_limit
        is_free = self.rerun_on_crash and not self.rate_limit and not any(limits)
        return f"{self.batch} {self.name}" if self.batch > 1 and is_one and is_free else ""

    def affinity_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The key that jobs with these arguments share; empty if there is none or it cannot be told."""
        affinity = type(self).affinity
        if affinity is None:
            return ""
        tell = (lambda **given: given.get(affinity)) if isinstance(affinity, str) else affinity
        return self._told("affinity", tell, args, kwargs)

    def preferred_node(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The id of the node that ``prefers`` names for a job with these arguments; empty if it names none."""
        prefers = type(self).prefers
        return "" if prefers is None else self._told("node", partial(prefers, self.app), args, kwargs)

    def _told(self, noun: str, tell: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What a function tells of a job by its arguments; empty if it tells nothing, or cannot."""
        try:
            given = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return ""
        try:
            found = tell(**given)
        except Exception as exc:  # noqa: BLE001 - it is the user's function, and a preference is not worth a job
            logger.warning("%s: the %s of a job cannot be told, any node gets it: %r", self.name, noun, exc)
            return ""
        return "" if found is None else str(found)

    def on_replace(self, sig: Signature) -> Any:
        """Send what this task is replaced by, and listen for no part of it. The last is streamed if this was to be."""
        if (asked := self.request.get(STREAM_HEADER)) is not None:
            end = sig.tasks[-1] if isinstance(sig, _chain) else sig
            end.set(headers={**(end.options.get("headers") or {}), STREAM_HEADER: asked})
        if self.request.is_eager or not isinstance(sig, _chord):
            return super().on_replace(sig)
        _alone(sig.delay())
        raise Ignore("Replaced by new task")

    def signature_from_request(self, request: Any = None, *args: Any, **options: Any) -> Signature:
        """Celery sends a retry to the queue it came from; a retry of ours is balanced anew."""
        signature = super().signature_from_request(request, *args, **options)
        keys = Keys(self.app.conf.broker_transport_options.get("cluster_name", Keys().name))
        if keys.owns(str(signature.options.get("queue", ""))):
            del signature.options["queue"]
        return signature


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[None]:
    """While the block lasts, jobs of this thread end with what ``answers`` has for their ids; an error fails them.

    The function of their task does not run: they have been done ``together``.
    """
    token = _answers.set(answers)
    try:
        yield
    finally:
        _answers.reset(token)


def _rest_of_arguments(signature: inspect.Signature) -> str:
    """The name of the parameter that takes all others; empty if there is none."""
    parameters = signature.parameters.values()
    return next((one.name for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD), "")


def _check_batch(task: type[ClusterTask]) -> None:
    """Raise ConfigurationError if a task cannot be done in such batches."""
    name, most, wait_s = task.name, task.batch, task.batch_wait_s
    if not (isinstance(most, int) and 1 <= most <= MOST_IN_BATCH):
        raise ConfigurationError(f"{name}: batch is a whole number from 1 to {MOST_IN_BATCH}, not {most!r}")
    if not (isinstance(wait_s, int | float) and 0 <= wait_s <= MOST_BATCH_WAIT_S):
        raise ConfigurationError(f"{name}: batch_wait_s is from 0 to {MOST_BATCH_WAIT_S:g} seconds, not {wait_s!r}")
    if most > 1 and task.together is None:
        raise ConfigurationError(f"{name}: batch={most} needs together=, which does several jobs in one call")


def _wanted(options: Mapping[str, Any]) -> set[str]:
    """The names of the options of a call. That it is to be streamed is no more than that its result is wanted."""
    is_streamed = (options.get("headers") or {}).keys() == {STREAM_HEADER}
    return options.keys() - ({"headers"} if is_streamed else set())


def _alone(result: Any) -> Any:
    """Return the result of the body of a chord without those of its parts, in which nobody is interested.

    Celery would listen for each of them, and be sent what it holds, until their group, which is in a cycle, is
    collected.
    """
    parent, result.parent = result.parent, None
    for part in getattr(parent, "results", None) or ():
        if (let_go := getattr(part.backend, "on_result_fulfilled", None)) is not None:
            with suppress(redis.RedisError, OperationalError):
                let_go(part)
    return result


def expiry(expires: Any) -> float | None:
    """Return when a job expires, in seconds since 1970, of what Celery is told or tells of it."""
    if isinstance(expires, str):
        expires = datetime.fromisoformat(expires)
    if isinstance(expires, datetime):
        # Whatever the time zone of the app is: so Celery's workers read it.
        return (expires if expires.tzinfo else expires.replace(tzinfo=UTC)).timestamp()
    return None if expires is None else time.time() + float(expires)


def validate_arguments(task_name: str, model: type[BaseModel], arguments: Mapping[str, Any]) -> BaseModel:
    """Return ``arguments`` as ``model``. Raises InvalidArguments that names each field and says what is wrong."""
    try:
        return model.model_validate(arguments)
    except ValidationError as exc:
        raise InvalidArguments(f"{task_name}: {'; '.join(map(_problem, exc.errors()))}") from None


def _problem(error: ErrorDetails) -> str:
    field, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _sizes(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_size(item)}" for key, item in value.items()) + "}"
    return "(" + ", ".join(_size(item) for item in value) + ")"


def _size(value: Any) -> str:
    if isinstance(value, bool | int | float | None):
        return repr(value)
    if isinstance(value, str | bytes):
        return f"<{len(value)} characters>"
    if isinstance(value, Mapping | Sequence):
        return f"<{len(value)} items>"
    return f"<{type(value).__name__}>"
