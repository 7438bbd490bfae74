"""The spans. Imported only where OpenTelemetry is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import Token
from dataclasses import dataclass
from typing import Any

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

_tracer = trace.get_tracer("cluster_tasks")

Facts = Mapping[str, str | int | float | bool]


def has_provider() -> bool:
    """Whether somebody has set what makes spans."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def publishing(job: str, facts: Facts, headers: MutableMapping[str, str]) -> Iterator[None]:
    """See ``tracing.publishing``."""
    with _tracer.start_as_current_span(f"publish {job}", kind=SpanKind.PRODUCER, attributes=facts):
        propagate.inject(headers)
        yield


@contextmanager
def calling(provider: str) -> Iterator[None]:
    """See ``tracing.calling``."""
    facts = {"cluster.provider": provider}
    with _tracer.start_as_current_span(f"call {provider}", kind=SpanKind.CLIENT, attributes=facts):
        yield


@dataclass(frozen=True, slots=True)
class Run:
    """The span of a job that runs; it is the current one of its thread."""

    span: Span
    token: Token[Context]


def begin_run(job: str, carrier: Mapping[str, Any], facts: Facts, waited: tuple[float, float] | None) -> Run:
    """Begin the span of a job that starts now. ``carrier`` holds the headers of its message.

    ``waited``: from when till when it waited, in seconds since 1970, by the clocks of two hosts: a span by itself.
    """
    parent = propagate.extract(carrier)
    if waited is not None:
        since_ns, until_ns = (int(at_s * 1e9) for at_s in waited)
        span = _tracer.start_span(f"wait {job}", parent, attributes=facts, start_time=since_ns)
        span.end(until_ns)
    span = _tracer.start_span(f"run {job}", parent, kind=SpanKind.CONSUMER, attributes=facts)
    return Run(span, context.attach(trace.set_span_in_context(span, parent)))


def end_run(run: Run, state: str, error: BaseException | None) -> None:
    """End it, in the thread that began it; ``error`` is what the job failed with."""
    run.span.set_attribute("cluster.state", state)
    if error is not None:
        run.span.record_exception(error)
        run.span.set_status(Status(StatusCode.ERROR, str(error)))
    context.detach(run.token)
    run.span.end()
