"""The kill loop on nodes of the pool threads; one pool a file, for files run side by side."""

from __future__ import annotations

import random

import pytest

from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.kills.loop import kill_at_random_instants


@pytest.mark.timeout(300)
def test_kills_at_random_instants_lose_and_double_nothing(
    jobs: Jobs, new_worker: NewWorker, rng: random.Random
) -> None:
    kill_at_random_instants("threads", jobs, new_worker, rng)
