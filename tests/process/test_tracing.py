"""The traces of jobs, through real workers."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from tests.process import traced
from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.nodes import running
from tests.process.traced import Span, read_spans
from tests.waiting import wait_until
from workers.redis_server import RedisServer

TRACED = """
import sys
from opentelemetry import trace
from tests.process.traced import app, ask, jobs
with trace.get_tracer("test").start_as_current_span("caller"):
    {0}
app.close()
"""


def call(redis_url: str, what: str) -> None:
    """Be a caller whose process is traced: a tracer's provider can be set once in a process."""
    environ = {**os.environ, "CLUSTER_BROKER_URL": redis_url, "TEST_TRACED": "1"}
    subprocess.run([sys.executable, "-c", TRACED.format(what)], env=environ, check=True, timeout=END_S)


def tree(spans: list[Span], parent: str | None = None) -> dict[str, object]:
    """The names of spans below one."""
    return {span.name: tree(spans, span.id) for span in spans if span.parent == parent}


def named(spans: list[Span], name: str) -> Span:
    """The one span of a name."""
    (found,) = [span for span in spans if span.name == name]
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_trace_goes_from_the_caller_through_the_list_to_node_and_provider(
    redis_server: RedisServer, new_worker: NewWorker, pool: str
) -> None:
    node = new_worker("node", app="tests.process.traced", pool=pool, environ={"TEST_TRACED": "1"})
    client = traced.redis.Redis.from_url(redis_server.url)
    with client, running(node):
        call(redis_server.url, "assert ask.apply_async(headers={'strategy': 'round_robin'}).get(timeout=60)")
        spans = wait_until(lambda: len(found := read_spans(client)) == 5 and found, END_S, "all spans are there")
        assert tree(spans) == {
            "caller": {"publish jobs.ask": {"wait jobs.ask": {}, "run jobs.ask": {"call gpt": {}}}}
        }  # fmt: skip
        assert len({span.trace for span in spans}) == 1
        publish, wait, run = (named(spans, f"{what} jobs.ask") for what in ("publish", "wait", "run"))
        assert (publish.kind, run.kind, named(spans, "call gpt").kind) == ("PRODUCER", "CONSUMER", "CLIENT")
        chosen = [publish.facts[f"cluster.{what}"] for what in ("strategy", "node", "request_type")]
        assert chosen == ["round_robin", node.id, "llm"]
        assert publish.facts["messaging.destination.name"] == f"node.{node.id}"
        assert publish.facts["messaging.message.id"] == run.facts["messaging.message.id"]
        assert (run.facts["cluster.node"], run.facts["cluster.state"], run.status) == (node.id, "SUCCESS", "UNSET")
        assert publish.began <= wait.ended <= run.ended
        client.delete(traced.KEY)

        call(redis_server.url, "ask.apply_async((False,), countdown=3).get(timeout=60, propagate=False)")
        spans = wait_until(lambda: len(found := read_spans(client)) == 5 and found, END_S, "all spans are there")
        assert (named(spans, "run jobs.ask").status, named(spans, "call gpt").status) == ("ERROR", "ERROR")
        sent, began = (datetime.fromisoformat(named(spans, f"{what} jobs.ask").began) for what in ("publish", "wait"))
        assert began - sent > timedelta(seconds=2), "it waits when it is due"
        client.delete(traced.KEY)

        call(redis_server.url, "(jobs.flaky.s(1) | jobs.silent.si(0.0)).delay().parent.get(timeout=60)")
        spans = wait_until(lambda: len(found := read_spans(client)) == 10 and found, END_S, "all spans are there")
        below = {"wait jobs.flaky": {}, "run jobs.flaky": {"publish jobs.silent": {
            "wait jobs.silent": {}, "run jobs.silent": {},
        }}}  # fmt: skip
        assert tree(spans) == {
            "caller": {"publish jobs.flaky": {"wait jobs.flaky": {}, "run jobs.flaky": {"publish jobs.flaky": below}}}
        }, "a retry and the next step of a chain belong to the run that sent them"
