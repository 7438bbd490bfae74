"""Jobs that beat sends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.process.celery_features.conftest import APP, END_S, Jobs, jobs_on_nodes


@pytest.fixture(scope="module")
def jobs(redis_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """One node: beat needs no more."""
    with jobs_on_nodes(tmp_path_factory.mktemp("nodes"), "a") as jobs:
        yield jobs


def test_the_schedule_of_the_users_app_is_kept_by_a_beat_of_its_own(jobs: Jobs) -> None:
    schedule, log = jobs.directory / "schedule", jobs.directory / "beat.log"
    command = [sys.executable, "-m", "celery", "-A", APP, "beat", "-s", str(schedule), "--pidfile="]
    with log.open("wb") as output:
        environ = {**os.environ, "CLUSTER_BROKER_URL": jobs.server.url}
        beat = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    try:
        assert set(jobs.wait_for_notes("tick", 3)) == {"tock"}
    finally:
        beat.terminate()
        beat.wait(END_S)


def test_the_schedule_of_the_users_app_is_kept_by_a_beat_in_a_node(
    redis_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("beat")
    with jobs_on_nodes(directory, "a", options=("-B", "-s", str(directory / "schedule")), leave_nothing=False) as jobs:
        assert set(jobs.wait_for_notes("tick", 3)) == {"tock"}
