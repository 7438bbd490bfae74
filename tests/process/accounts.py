"""What became of the jobs of a test."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.process.jobs import Jobs

END_S = 60.0


def finish(results: list[Any]) -> Counter[str]:
    """Wait for all jobs; count them by the node that did them."""
    return Counter(result.get(timeout=END_S) for result in results)


def nothing_is_left(jobs: Jobs) -> bool:
    """Whether no list, hash or index of the cluster holds a job any more."""
    client, keys = jobs.cluster.client, jobs.cluster.keys
    kept = (f"{keys.name}:{kind}*" for kind in ("unacked", "remains", "not_started", "crashes"))
    patterns = (*kept, "node.*", "waiting.*", "suspect.*", keys.undecodable, keys.delayed)
    return not jobs.cluster.epochs.lengths() and not any(list(client.scan_iter(pattern)) for pattern in patterns)


def starts_of(jobs: Jobs, results: list[Any]) -> Counter[str]:
    """How often each job was started."""
    return Counter({result.id: jobs.cluster.client.llen(f"test:started:{result.id}") for result in results})


def held_key(jobs: Jobs, node_id: str) -> str:
    """The hash of what a node holds now."""
    beat = jobs.cluster.epochs.beats().get(node_id)
    return jobs.cluster.keys.unacked(node_id, beat.epoch if beat else "none")
