"""Random instants that can be had again: a run prints its seed, ``KILL_LOOP_SEED`` repeats it."""

from __future__ import annotations

import os
import random

import pytest

from tests.process.conftest import jobs, new_worker  # noqa: F401 - as the tests beside have them


@pytest.fixture
def rng() -> random.Random:
    seed = os.environ.get("KILL_LOOP_SEED") or str(random.SystemRandom().randrange(10**9))
    print(f"KILL_LOOP_SEED={seed}")
    return random.Random(seed)
