"""What a scenario works with: jobs, nodes, load, history and checker over one Redis."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.chaos.checker import STANDSTILL_S, Checker
from tests.chaos.history import History, followed
from tests.chaos.jobs import ChaosJobs, make_chaos_jobs
from tests.chaos.load import Load
from tests.chaos.nodes import Nodes
from tests.process.nodes import WorkerProcess

APP = "tests.chaos.audited"
QUICK = {"CLUSTER_HEARTBEAT_S": "0.3", "CLUSTER_LEASE_S": "1.2", "CLUSTER_HEALTH_CHECK_S": "0.25"}
"""Settings for scenarios that do not measure times."""
PATIENT = QUICK | {"CLUSTER_LEASE_S": "5"}
"""The same where nobody who lives may be taken for dead, on a machine that starts nodes meanwhile."""
# Whoever is killed often takes jobs along that did nothing: where all must succeed, no crash convicts.
FORGIVING = {"CLUSTER_MAX_CRASH_DELIVERIES": "1000"}
POOLS = ("prefork", "threads", "solo")


class Chaos:
    """A scenario. ``broker_url`` is where its nodes connect, which may be a wire; the caller's side has its own way."""

    def __init__(
        self, jobs: ChaosJobs, history: History, rng: random.Random, directory: Path, broker_url: str, notes_url: str,
        standstill_s: float = STANDSTILL_S,
    ) -> None:  # fmt: skip
        self.jobs, self.history, self.rng = jobs, history, rng
        self.notes = redis.Redis.from_url(notes_url)
        self.checker = Checker(jobs, history, standstill_s, self.notes)
        self._directory, self._broker_url, self._notes_url = directory, broker_url, notes_url

    def worker(self, name: str, pool: str = "threads", **options: Any) -> WorkerProcess:
        """Make one worker, not started yet; ``options`` as of ``WorkerProcess``."""
        environ = {"TEST_NOTES_URL": self._notes_url, **(options.pop("environ", None) or {})}
        options = {"app": APP, "pool": pool, "environ": environ, **options}
        return WorkerProcess(name, options.pop("broker_url", self._broker_url), self._directory, **options)

    def nodes(self, number: int, *, pools: tuple[str, ...] = ("threads",), **options: Any) -> Nodes:
        """Start so many nodes, of pools in turn; they may not be ready yet."""
        nodes = Nodes(lambda name, pool: self.worker(name, pool, **options), self.jobs.cluster.epochs, self.rng, pools)
        nodes.add(number)
        return nodes

    def load(self, **options: Any) -> Load:
        """Make the load, not started yet; ``options`` as of ``Load``."""
        return Load(self.jobs, self.history, random.Random(self.rng.random()), **options)


@contextmanager
def chaos_on(
    url: str,
    directory: Path,
    rng: random.Random,
    *,
    nodes_url: str = "",
    notes_url: str = "",
    history_url: str = "",
    **options: Any,
) -> Iterator[Chaos]:
    """A scenario on the Redis at ``url``. ``nodes_url`` is the way of the nodes if it is another, ``notes_url`` the
    Redis for what tasks note, if the first breaks; ``history_url`` is the Redis that is followed."""
    before = os.environ.get("CLUSTER_BROKER_URL")
    os.environ["CLUSTER_BROKER_URL"] = url
    try:
        jobs = make_chaos_jobs()
        with followed(history_url or url) as history:
            chaos = Chaos(jobs, history, rng, directory, nodes_url or url, notes_url or url, **options)
            yield chaos
        chaos.notes.close()
        jobs.app.close()
    finally:
        del os.environ["CLUSTER_BROKER_URL"]
        if before is not None:
            os.environ["CLUSTER_BROKER_URL"] = before
