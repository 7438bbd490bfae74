"""Traces of jobs by OpenTelemetry: from who sends one, through its list, to its node and its provider.

Spans are made by OpenTelemetry's API where it is installed (``cluster-tasks[otel]``), and go where the SDK of the
application sends them. Without it everything here does nothing.

Why not opentelemetry-instrumentation-celery (0.66): it knows neither the router's choice nor how long a job waited, and
it opens a span when a message is about to be sent that stays open, and current, where the sending fails or the task is
known by its name only. Its spans and these fit into each other; nobody needs both.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

try:
    import opentelemetry.trace  # noqa: F401
except ImportError:
    IS_INSTALLED = False
else:
    IS_INSTALLED = True
    """Whether OpenTelemetry's API is here."""

if TYPE_CHECKING or IS_INSTALLED:
    from cluster_tasks.tracing import spans

Facts = Mapping[str, str | int | float | bool]
"""Attributes of a span."""
_NOTHING = nullcontext()


def is_on() -> bool:
    """Whether spans go anywhere: an application that has set no provider of tracers pays for none."""
    return IS_INSTALLED and spans.has_provider()


def publishing(job: str, facts: Facts, headers: MutableMapping[str, str]) -> AbstractContextManager[None]:
    """Return the span in which a job is sent, by the name of its task; its context is put into ``headers``."""
    return spans.publishing(job, facts, headers) if is_on() else _NOTHING


def calling(provider: str) -> AbstractContextManager[None]:
    """Return the span of a request to a provider. An error that leaves the block is an error of the span."""
    return spans.calling(provider) if is_on() else _NOTHING
