"""Servers that tests share."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from workers.redis_server import RedisServer, free_port


def missing(what: str) -> NoReturn:
    """End a test for lack of a program: skipped on a laptop, failed in CI."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def free_ports(count: int) -> list[int]:
    """Return so many different ports of the loopback that nobody listens on now."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


@contextmanager
def redis_for_results(directory: Path, **options: Any) -> Iterator[RedisServer]:
    """Run a Redis that outlives the results of the jobs that are sent through it."""
    with RedisServer(directory, **options) as server:
        yield server
        # A result unsubscribes when it is collected: now, while its Redis is there, and not in some later test. The
        # connections that Celery's waiting for results had in an outage are dropped, and closed only here.
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()


@contextmanager
def standing_still(*pids: int) -> Iterator[None]:
    """Stop processes for as long as the block lasts; the last of them is the first to go on."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
