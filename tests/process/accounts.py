"""What became of the jobs of a test."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from cluster_tasks import Cluster
from cluster_tasks.redis_store import text
from tests.waiting import wait_until

END_S = 120.0


class Jobs(Protocol):
    """The app of a test."""

    @property
    def cluster(self) -> Cluster:
        """Its cluster."""


def finish(results: list[Any]) -> Counter[str]:
    """Wait for all jobs; count them by the node that did them."""
    return Counter(result.get(timeout=END_S) for result in results)


def left_over(jobs: Jobs) -> list[str]:
    """The keys and lists of the cluster in which a job still is, or that should have gone with it."""
    client, keys = jobs.cluster.client, jobs.cluster.keys
    kept = (f"{keys.name}:{kind}*" for kind in ("unacked", "remains", "not_started", "crashes"))
    patterns = (*kept, "node.*", "waiting.*", "suspect.*", keys.undecodable, keys.delayed)
    found = {text(key) for pattern in patterns for key in client.scan_iter(pattern)}
    return sorted(found | set(jobs.cluster.epochs.lengths()))


def wait_until_nothing_is_left(jobs: Jobs) -> None:
    """Wait until the last acknowledgements have arrived."""
    left: list[str] = ["?"]

    def nothing_is_left() -> bool:
        left[:] = left_over(jobs)
        return not left

    try:
        wait_until(nothing_is_left, END_S)
    except AssertionError:
        raise AssertionError(f"left in Redis: {left}") from None


def starts_of(jobs: Jobs, results: list[Any]) -> Counter[str]:
    """How often each job was started."""
    return Counter({result.id: jobs.cluster.client.llen(f"test:started:{result.id}") for result in results})


def started_by(jobs: Jobs, results: list[Any], node_id: str) -> int:
    """How many starts of these jobs a node has noted. (What it holds may not have begun.)"""
    nodes = (jobs.cluster.client.lrange(f"test:started:{result.id}", 0, -1) for result in results)
    return sum([text(node) for node in started].count(node_id) for started in nodes)


def held_key(jobs: Jobs, node_id: str) -> str:
    """The hash of what a node holds now."""
    beat = jobs.cluster.epochs.beats().get(node_id)
    return jobs.cluster.keys.unacked(node_id, beat.epoch if beat else "none")
