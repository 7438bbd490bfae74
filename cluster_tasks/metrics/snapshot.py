"""The state of the cluster at one moment, as Prometheus is told of it, read in few round trips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from cluster_tasks.breaker import BreakerPolicy, BreakerState, Phase, phase_of
from cluster_tasks.broker.epochs import Limit
from cluster_tasks.broker.epochs import Phase as LimitPhase
from cluster_tasks.broker.placement import Why
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import ANY_TYPE, BOUND, Keys
from cluster_tasks.metrics.counts import JobCounts, read_counts
from cluster_tasks.model import Node
from cluster_tasks.redis_store import foreign_errors, text


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node that stands, as the broker knows it."""

    is_coordinator: bool
    serves: frozenset[str]
    """Request types; without ``any``, which every node serves."""
    beats: int
    """Of its epoch."""
    queued: int
    """Jobs in both of its lists."""
    draining: bool
    limit: Limit | None
    jobs: Mapping[str, JobCounts]
    """By request type; those of an earlier epoch are among them."""

    @property
    def is_given_jobs(self) -> bool:
        """Whether jobs are placed on it."""
        limited = self.limit is not None and self.limit.phase is not LimitPhase.RAMPING
        return not (self.is_coordinator or self.draining or limited)


@dataclass(frozen=True, slots=True)
class ProviderState:
    """What the cluster knows of a provider."""

    phase: Phase
    requests: Mapping[str, int]
    """By outcome."""


@dataclass(frozen=True, slots=True)
class BrokerState:
    """What the Redis of the broker knows."""

    nodes: Mapping[str, NodeState]
    """By id, those whose epoch stands."""
    jobs: Mapping[str, JobCounts]
    """By request type, of all nodes that ever were; nothing is held by them."""
    waiting: Mapping[str, int]
    """Jobs that have no node, by request type."""
    suspects: Mapping[str, int]
    """Those of them that were running when a process died."""
    delayed: int
    quarantined: int
    undecodable: int
    unfinished_failovers: int
    """Epochs that have ended and whose jobs are not all moved."""
    moved: Mapping[Why, int]
    crash_deliveries: int
    stale_commits: int
    nodes_lost: int
    checks: int
    """Health checks that coordinators have run."""
    providers: Mapping[str, ProviderState]
    """By name, those that were ever asked."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was learnt of the cluster; None: who knows it did not answer in time."""

    lease_s: float
    broker: BrokerState | None
    registered: Sequence[Node] | None
    cache: Mapping[str, float] | None
    """What ``Caches.sums`` says."""
    has_cache: bool = True
    """Whether there is a cache that could answer."""


class _Details(NamedTuple):
    """What is read of each node and each provider, by their names."""

    counted: Mapping[str, Mapping[Any, Any]]
    tasks: Mapping[str, int]
    """Length of the names of the tasks that the node runs."""
    breakers: Mapping[str, bytes | None]
    now_s: float


class BrokerReader:
    """Reads what the broker knows, in two round trips."""

    def __init__(self, client: redis.Redis, keys: Keys, breaker: BreakerPolicy) -> None:
        self._client, self._keys, self._breaker = client, keys, breaker

    def read(self) -> BrokerState:
        """Return it. Raises BrokerUnavailable."""
        with foreign_errors(BrokerUnavailable, "reading the state of the cluster"):
            known = self._read_tables()
            node_ids = [node_id for queue in known["epochs"] if (node_id := self._keys.node_of(queue)) is not None]
            requests = _requests(known["provider_counts"])
            details = self._read_each(node_ids, list(requests))
        lists = {text(queue): int(length) for queue, length in known["backlog"]}
        counters = known["counters"]
        return BrokerState(
            nodes={node_id: self._node(node_id, known, lists, details) for node_id in sorted(node_ids)},
            jobs=read_counts(known["job_counts"]),
            waiting=_by_type(lists, self._keys.waiting_queue(ANY_TYPE).removesuffix(ANY_TYPE)),
            suspects=_by_type(lists, self._keys.suspect_queue(ANY_TYPE).removesuffix(ANY_TYPE)),
            delayed=known["delayed"], quarantined=known["quarantined"], undecodable=known["undecodable"],
            unfinished_failovers=known["fenced"],
            moved={why: int(counters.get(why.counter, 0)) for why in Why},
            crash_deliveries=int(counters.get("crash_deliveries", 0)),
            stale_commits=int(counters.get("stale_commits", 0)),
            nodes_lost=int(counters.get("nodes_lost", 0)),
            checks=int(known["checks"] or 0),
            providers={name: self._provider(name, requests[name], details) for name in requests},
        )  # fmt: skip

    def _read_tables(self) -> dict[str, Any]:
        keys = self._keys
        with self._client.pipeline(transaction=False) as pipe:
            hashes = ("epochs", "beats", "serves", "slot_limits", "counters", "job_counts", "provider_counts")
            for name in hashes:
                pipe.hgetall(getattr(keys, name))
            pipe.zrange(keys.backlog, 0, -1, withscores=True)
            pipe.smembers(keys.draining)
            pipe.zcard(keys.delayed)
            pipe.zcard(keys.quarantined)
            pipe.llen(keys.undecodable)
            pipe.hlen(keys.fenced)
            pipe.get(keys.checks)
            replies = pipe.execute()
        others = ("backlog", "draining", "delayed", "quarantined", "undecodable", "fenced", "checks")
        known = dict(zip((*hashes, *others), replies, strict=True))
        for name in hashes:
            known[name] = {text(field): text(value) for field, value in known[name].items()}
        known["draining"] = {text(queue) for queue in known["draining"]}
        return known

    def _read_each(self, node_ids: Sequence[str], providers: Sequence[str]) -> _Details:
        keys = self._keys
        with self._client.pipeline(transaction=False) as pipe:
            for node_id in node_ids:
                pipe.hgetall(keys.node_counts(node_id))
                pipe.hstrlen(keys.tasks, keys.node_queue(node_id))
            for name in providers:
                pipe.get(keys.breaker(name))
            pipe.time()
            replies = iter(pipe.execute())
        counted, tasks = {}, {}
        for node_id in node_ids:
            counted[node_id], tasks[node_id] = next(replies), next(replies)
        breakers = {name: next(replies) for name in providers}
        seconds, microseconds = next(replies)
        return _Details(counted, tasks, breakers, seconds + microseconds / 1e6)

    def _node(self, node_id: str, known: Mapping[str, Any], lists: Mapping[str, int], details: _Details) -> NodeState:
        queue = self._keys.node_queue(node_id)
        limit = known["slot_limits"].get(queue)
        return NodeState(
            # It alone runs none of the tasks that it knows.
            is_coordinator=not details.tasks[node_id],
            serves=frozenset(known["serves"].get(queue, "").strip(",").split(",")) - {ANY_TYPE, ""},
            beats=int(known["beats"].get(queue, 0)),
            queued=lists.get(queue, 0) + lists.get(queue + BOUND, 0),
            draining=queue in known["draining"],
            limit=Limit.read(limit) if limit else None,
            jobs=read_counts(details.counted[node_id]),
        )

    def _provider(self, name: str, requests: Mapping[str, int], details: _Details) -> ProviderState:
        state = BreakerState.from_json(details.breakers[name] or b"{}")
        return ProviderState(phase_of(state, self._breaker, details.now_s), requests)


def _requests(counted: Mapping[str, str]) -> dict[str, dict[str, int]]:
    by_provider: dict[str, dict[str, int]] = {}
    for field, number in sorted(counted.items()):
        outcome, _, name = field.partition(" ")
        by_provider.setdefault(name, {})[outcome] = int(number)
    return by_provider


def _by_type(lists: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {queue.removeprefix(prefix): length for queue, length in sorted(lists.items()) if queue.startswith(prefix)}
