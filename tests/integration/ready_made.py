"""A worker with the ready-made jobs, and who sends it some."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from cluster_tasks import Cluster
from cluster_tasks.breaker import BreakerState
from cluster_tasks.cluster import cluster_of
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
WITHIN_S = 120.0
Run = Callable[..., Any]
"""Sends a job by its name and returns its result."""


@contextmanager
def node(broker: str, name: str, directory: Path, nodename: str = "a", **settings: str) -> Iterator[Celery]:
    """Run a worker, the plain Celery command, in a cluster of this name. Gives an app that sends it jobs."""
    own = {"CLUSTER_BROKER_URL": broker, "CLUSTER_NAME": name, "CLUSTER_DATA_DIR": str(directory / name)}
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "cluster_tasks",
        "worker",
        "-l",
        "INFO",
        "-E",
        "-n",
        f"{nodename}@%h",
    ]
    with Celery("sender", set_as_current=False, broker=broker) as app, log_of(directory, name).open("ab") as log:
        app.conf.update(cluster_name=name, **{setting.lower(): value for setting, value in settings.items()})
        cluster = Cluster(app)
        environment = {**os.environ, **own, "NO_PROXY": "127.0.0.1", **settings}
        worker = subprocess.Popen(
            [*command, "-P", "threads", "-c", "2", "-n", f"{nodename}@%h"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            message = f"the node joins; it says {log.name}"
            wait_until(lambda: nodename in [each.id.partition("@")[0] for each in cluster.nodes()], WITHIN_S, message)
            yield app
        finally:
            stop(worker)


def log_of(directory: Path, name: str) -> Path:
    return directory / f"{name}.log"


def stop(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    try:
        worker.wait(WITHIN_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        pytest.fail("the worker did not end on SIGTERM")


def sender(app: Celery) -> Run:
    return lambda job, *args, **kwargs: app.tasks[job].delay(*args, **kwargs).get(timeout=WITHIN_S)


def end_timeout(app: Celery, provider: str) -> None:
    """Let the breaker of a provider have opened long ago."""
    cluster = cluster_of(app)
    key = cluster.keys.breaker(provider)
    state = BreakerState.from_json(cluster.client.get(key))
    cluster.client.set(key, replace(state, opened_at_s=0).to_json())
