"""What follows a job is published once, however often the job is delivered, and only by a delivery that stands.

That is the next step of a chain, links, errbacks, the body of a chord, and the job's own retry. Celery publishes most
of it before the result is stored, so a crash in between repeats it. Each of them has its id before the job is sent; the
script that places it looks whether this attempt at that id was placed before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from celery import Celery, signature, states
from celery._state import get_current_worker_task

from cluster_tasks.broker.message import Delivery

FOLLOWS_PROPERTY = "cluster_follows"
"""Where a message says on its way to the transport what it follows; see Sequel."""
_BODY_ERRBACKS = UUID("5d1e3f8a-6c57-4f0e-9b57-0c7b5b6a2f11")
_ending: ContextVar[Any] = ContextVar("ending", default=None)


class Sequel(NamedTuple):
    """What a message follows, and as what it is remembered."""

    node_id: str
    epoch: str
    tag: str
    """With the two before: the delivery, which must stand."""
    scope: str
    """The job, or the chord (by the id of its body), whose sequels are remembered together."""
    attempt: str
    """The id of the job that the message is for, and which attempt at it."""


@contextmanager
def ending(request: Any) -> Iterator[None]:
    """While the block lasts, what is published may follow the job of ``request``, whatever task runs."""
    token = _ending.set(request)
    try:
        yield
    finally:
        _ending.reset(token)


def complete(backend: Any, request: Any) -> None:
    """Do again what follows the end of a job, if it has ended: a crash may have come between the two.

    The end is kept for this, also where nobody wanted the result or it has expired. Chords count each part once.
    """
    if not has_ended(backend, request.id):
        return
    meta = backend.get_task_meta(request.id)
    if meta["status"] not in states.READY_STATES and hasattr(backend, "kept_end"):
        meta = backend.kept_end(request.id) or meta
    state, result, traceback = meta["status"], meta["result"], meta.get("traceback")
    if state not in states.READY_STATES:
        return
    with ending(request):
        if request.chord:
            backend.on_chord_part_return(request, state, result)
        if state == states.FAILURE:
            backend._fail_chain(request.chain, result, traceback)
            if request.errbacks:
                backend._call_task_errbacks(request, result, traceback)


def has_ended(backend: Any, job_id: str) -> bool:
    """Whether a job has ended where its state is one, which a task may also store itself; True if that is not known."""
    return not hasattr(backend, "has_ended") or bool(backend.has_ended(job_id))


def being_ended() -> Delivery | None:
    """The delivery whose job this thread brings to its end, if it does."""
    return Delivery.of(getattr(_ending.get(), "properties", None))


def ended_job() -> str:
    """The id of the job that this thread brings to its end; empty if it does not."""
    return str(getattr(_ending.get(), "id", None) or "")


def attempt_of(headers: Any) -> tuple[int, int]:
    """Which run of a job a message asks for: how often it was replaced, and how often retried since."""
    return headers.get("replaced_task_nesting") or 0, headers.get("retries") or 0


def parse_attempt(written: str) -> tuple[str, tuple[int, int]]:
    """Read what a sequel is remembered as: the id of its job, and the attempt."""
    job_id, _, attempt = written.rpartition("/")
    nesting, retries = attempt.split(".")
    return job_id, (int(nesting), int(retries))


def announce(app: Celery, message: Any) -> None:
    """Prepare a message of Celery for its way: what it embeds gets ids, and it says what it follows, if anything."""
    headers, properties, body = message.headers, message.properties, message.body
    if not isinstance(body, tuple):  # The old protocol has neither chains nor chords.
        return
    _, _, embedded = body
    for kind in ("callbacks", "errbacks"):
        if embedded[kind]:
            embedded[kind] = [_with_id(app, each) for each in _listed(embedded[kind])]
    if isinstance(embedded["chord"], Mapping):
        embedded["chord"] = _with_ids_of_errbacks(embedded["chord"])
    if sequel := _sequel(headers):
        properties[FOLLOWS_PROPERTY] = list(sequel)


def _sequel(headers: Mapping[str, Any]) -> Sequel | None:
    task = get_current_worker_task()
    request = _ending.get() or (task.request if task else None)
    delivery = Delivery.of(getattr(request, "properties", None))
    if delivery is None:
        return None
    scope = _scope(headers, request)
    if not scope:
        return None
    nesting, retries = attempt_of(headers)
    attempt = f"{headers['id']}/{nesting}.{retries}"
    return Sequel(delivery.node_id, delivery.epoch, delivery.tag, scope, attempt)


def _scope(headers: Mapping[str, Any], request: Any) -> str:
    job_id = headers["id"]
    if job_id == request.id:
        # A task may also send itself anew under its own id: that is not a retry, and may happen any number of times.
        return str(request.id) if attempt_of(headers) > attempt_of(request) else ""
    if any(job_id in _ids(part) for part in (request.callbacks, request.errbacks)):
        return str(request.id)
    # Any part of its header may publish the body of a chord, so all of them must know that it was.
    for chord in _chords(request):
        if job_id in (ids := list(_ids(chord))):
            return ids[0]
    return str(request.id) if job_id in _ids(request.chain) else ""


def _chords(request: Any) -> Iterator[Any]:
    """The bodies of the chords to which a job, or one that was to follow it in its chain, belongs."""
    yield request.chord
    for step in request.chain or ():
        yield (step.get("options") or {}).get("chord")


def _ids(part: Any) -> Iterator[str]:
    """The ids of all jobs in signatures."""
    if isinstance(part, Mapping):
        options, parts = part.get("options") or {}, part.get("kwargs") or {}
        if options.get("task_id"):
            yield options["task_id"]
        for name in ("link", "link_error", "chord"):
            yield from _ids(options.get(name))
        if part.get("subtask_type"):
            for name in ("tasks", "header", "body"):
                yield from _ids(parts.get(name))
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _ids(each)


def _with_id(app: Celery, given: Any) -> Any:
    """A signature whose jobs have ids. It is a copy: each message that embeds it means jobs of its own."""
    if not isinstance(given, Mapping) or (given.get("options") or {}).get("task_id"):
        return given
    own = signature(given, app=app).clone()
    own.freeze()
    return own


def _with_ids_of_errbacks(body: Mapping[str, Any]) -> Any:
    """The body of a chord; all parts of the header must know its errbacks by the same ids."""
    options = body.get("options") or {}
    errbacks = _listed(options.get("link_error"))
    if not errbacks or not options.get("task_id"):
        return body
    known = [_with_this_id(each, f"{options['task_id']}/{place}") for place, each in enumerate(errbacks)]
    return {**body, "options": {**options, "link_error": known}}


def _with_this_id(given: Any, name: str) -> Any:
    if not isinstance(given, Mapping) or given.get("subtask_type") or (given.get("options") or {}).get("task_id"):
        return given
    return {**given, "options": {**(given.get("options") or {}), "task_id": str(uuid5(_BODY_ERRBACKS, name))}}


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value] if value else []
