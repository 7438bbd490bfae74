"""Tracing where OpenTelemetry is not installed, or not used."""

from __future__ import annotations

import subprocess
import sys

NOTHING = """
from celery import signals
from cluster_tasks import tracing
import workers.bootsteps
import workers.tracing
assert not tracing.is_on()
workers.tracing.follow_jobs()
headers = {}
with tracing.publishing("job", {}, headers) as made, tracing.calling("gpt") as call:
    assert made is call is None and headers == {}
assert tracing.publishing("job", {}, headers) is tracing.calling("gpt"), "nothing is made"
"""
WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
"""


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_opentelemetry_nothing_is_made_and_no_signal_is_sent() -> None:
    run(f"{WITHOUT}{NOTHING}\nassert not signals.task_prerun.receivers")


def test_where_nobody_has_said_where_spans_go_none_is_made() -> None:
    run(NOTHING)
