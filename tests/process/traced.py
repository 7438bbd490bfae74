"""The app of the other tests, all of whose processes write their spans into a list in Redis."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from cluster_tasks import ClusterTask
from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.errors import ProviderUnavailable
from cluster_tasks.gateway.guard import Guard
from cluster_tasks.gateway.shared import Limits
from tests.process.jobs import make_jobs

KEY = "test:spans"


@dataclass(frozen=True)
class Span:
    """A span as it was exported."""

    name: str
    kind: str
    id: str
    parent: str | None
    trace: str
    facts: dict[str, Any]
    status: str
    began: str
    ended: str


class ToRedis(SpanExporter):
    """Writes spans into the Redis of the broker."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with redis.Redis.from_url(os.environ["CLUSTER_BROKER_URL"]) as client:
            client.rpush(KEY, *(span.to_json(indent=None) for span in spans))
        return SpanExportResult.SUCCESS


def trace_to_redis() -> TracerProvider:
    """Make this process write its spans there."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ToRedis()))
    trace.set_tracer_provider(provider)
    return provider


def read_spans(client: redis.Redis) -> list[Span]:
    """Return all that was written."""
    listed: Any = client.lrange(KEY, 0, -1)
    return [_span(json.loads(each)) for each in listed]


def _span(told: dict[str, Any]) -> Span:
    ids = told["context"]
    return Span(
        told["name"], told["kind"].removeprefix("SpanKind."), ids["span_id"], told["parent_id"], ids["trace_id"],
        told["attributes"], told["status"]["status_code"], told["start_time"], told["end_time"],
    )  # fmt: skip


jobs = make_jobs()
app = jobs.app


@app.task(base=ClusterTask, shared=False, name="jobs.ask", request_type="llm")
def ask(answers: bool = True) -> str:
    """Ask a provider."""
    guard = Guard(jobs.cluster.neighbourhood, "gpt", BreakerPolicy(), Limits(), 0.0)
    return guard.send(lambda: _answer(answers), 1, len)


def _answer(answers: bool) -> str:
    if not answers:
        raise ProviderUnavailable("it is down")
    return "an answer"


if os.environ.get("TEST_TRACED"):
    trace_to_redis()
