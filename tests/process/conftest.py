"""A cluster of real workers for each test, and its caller's side in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess
from workers.redis_server import RedisServer

NewWorker = Callable[..., WorkerProcess]


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test as its producers see it."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_jobs()
    yield made
    made.app.close()


@pytest.fixture
def new_worker(redis_server: RedisServer, tmp_path: Path) -> NewWorker:
    """Make workers of the app under test, not started yet."""
    return lambda name, **options: WorkerProcess(name, redis_server.url, tmp_path, **options)
