"""What became of the jobs of a test."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import redis

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


def let_go(client: redis.Redis, *results: Any) -> None:
    """Let ``jobs.patient`` come to their ends; ``client`` is that of the Redis for what tasks note."""
    client.mset({f"test:go:{result.id}": 1 for result in results})


def let_each_be_followed(jobs: Jobs, results: list[Any], nodes: list[str], slots: int) -> None:
    """Wait until ``jobs.patient`` fill all slots, then let them go on one node after the other, as long as more wait.

    Each must be followed by another on its node. In the end all go.
    """
    client, going = jobs.cluster.client, set[str]()
    wait_until(lambda: all(started_by(jobs, results, node) == slots for node in nodes), END_S, "all slots are filled")
    while len(going) + slots * len(nodes) < len(results):
        node = nodes[len(going) % len(nodes)]
        before = started_by(jobs, results, node)
        leaving = next(each for each in results if each.id not in going and started_by(jobs, [each], node))
        going.add(leaving.id)
        let_go(client, leaving)
        wait_until(lambda n=node, b=before: started_by(jobs, results, n) == b + 1, END_S, f"another begins on {node}")
    let_go(client, *results)


def held_key(jobs: Jobs, node_id: str) -> str:
    """The hash of what a node holds now."""
    beat = jobs.cluster.epochs.beats().get(node_id)
    return jobs.cluster.keys.unacked(node_id, beat.epoch if beat else "none")
