"""Adaptive: the better of two random nodes, by what they report and how they have served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from cluster_tasks.balancing.base import Balancer, SentCounter, require_nodes
from cluster_tasks.clock import Clock
from cluster_tasks.model import Node, Request

CPU_WEIGHT, MEMORY_WEIGHT, CONNECTIONS_WEIGHT, HISTORY_WEIGHT = 0.3, 0.2, 0.3, 0.2

RAMP_UP_FLOOR = 0.1
"""How likely a node is accepted at the moment it joins."""

LEARNING_RATE = 0.2
"""The weight of the newest outcome in what is learned of a node."""

TRUST = 0.5
"""The share of the history that is learned here when it is fresh; the rest is what the node reports."""

TRUST_HALF_LIFE_S = 30.0


class Adaptive(Balancer):
    """Draws two random nodes and takes the one with the lower score.

    Never the best of all: every producer would pick the same node until the next snapshot.

    A node that appears in an ``update`` after the first is new, and so is a new epoch of a known one. It ramps up: as
    the better of the two it is accepted with a probability that grows linearly from RAMP_UP_FLOOR to 1 over
    ``ramp_up_s``, else the other is taken. Against a node that ramps up too, the ratio of both counts.
    """

    def __init__(self, clock: Clock, rng: Random, ramp_up_s: float = 10.0) -> None:
        self._clock = clock
        self._rng = rng
        self._ramp_up_s = ramp_up_s
        self._sent = SentCounter()
        self._learned: dict[str, _Learned] = {}
        self._joined_s: dict[tuple[str, str], float] | None = None

    def select(self, request: Request, nodes: Sequence[Node]) -> Node:
        """Return the lower of two random nodes by ``score``, if it has ramped up. Raises NoNodeAvailable."""
        require_nodes(request, nodes)
        node = self._accepted(sorted(self._rng.sample(nodes, min(2, len(nodes))), key=self.score))
        self._sent.add(node.id)
        return node

    def update(self, nodes: Sequence[Node]) -> None:
        """Count anew from a fresh view; whoever appears in it for the first time begins to ramp up."""
        self._sent.clear()
        known, now_s = self._joined_s, self._clock.monotonic()
        joined_s = float("-inf") if known is None else now_s
        self._joined_s = {(node.id, node.epoch): (known or {}).get((node.id, node.epoch), joined_s) for node in nodes}
        ids = {node.id for node in nodes}
        self._learned = {node_id: learned for node_id, learned in self._learned.items() if node_id in ids}

    def record(self, node_id: str, success: bool, latency_s: float) -> None:
        """Learn whether a request succeeded; its latency is in the load that the nodes report."""
        learned = self._learned.get(node_id)
        rate = 1.0 if learned is None else learned.success_rate
        rate += LEARNING_RATE * (success - rate)
        self._learned[node_id] = _Learned(rate, self._clock.monotonic())

    def score(self, node: Node) -> float:
        """How loaded a node is, from 0 (idle) to 1: 0.3 cpu + 0.2 memory + 0.3 connections + 0.2 history.

        Each part is between 0 and 1. cpu: of the whole machine. memory: of ``max_memory_mb``; 0 if that sets no limit,
        for there is nothing to be near to. connections: jobs in flight, those sent since the last update included, of
        ``max_connections``. history: the share of failures (see ``success_rate``).
        """
        load, capacity = node.load, node.capacity
        cpu = load.cpu_usage_percent / 100
        memory = load.memory_usage_mb / capacity.max_memory_mb if capacity.max_memory_mb else 0.0
        connections = self._sent.in_flight(node) / max(1, capacity.max_connections)
        return (
            CPU_WEIGHT * min(1.0, cpu)
            + MEMORY_WEIGHT * min(1.0, memory)
            + CONNECTIONS_WEIGHT * min(1.0, connections)
            + HISTORY_WEIGHT * (1.0 - self.success_rate(node))
        )

    def success_rate(self, node: Node) -> float:
        """The success rate that the node reports, mixed with the one that was learned here.

        What was learned is an exponentially weighted average of the recorded outcomes, from 1 on. It counts TRUST
        when fresh, and half as much after each TRUST_HALF_LIFE_S without a record, so that a node which gets no jobs
        for its failures is not shunned for ever.
        """
        reported = node.load.success_rate
        learned = self._learned.get(node.id)
        if learned is None:
            return reported
        age_s = self._clock.monotonic() - learned.at_s
        trust: float = TRUST * 0.5 ** (age_s / TRUST_HALF_LIFE_S)
        return reported + trust * (learned.success_rate - reported)

    def readiness(self, node: Node) -> float:
        """How far a node has ramped up: RAMP_UP_FLOOR when it joins, 1 after ``ramp_up_s``."""
        joined_s = (self._joined_s or {}).get((node.id, node.epoch))
        if joined_s is None:
            return 1.0
        age_s = self._clock.monotonic() - joined_s
        if age_s >= self._ramp_up_s:
            return 1.0
        return RAMP_UP_FLOOR + (1.0 - RAMP_UP_FLOOR) * age_s / self._ramp_up_s

    def _accepted(self, best_first: list[Node]) -> Node:
        better, other = best_first[0], best_first[-1]
        # A ratio: between two nodes of the same age the score must decide, not the fact that both are new.
        if self._rng.random() * self.readiness(other) < self.readiness(better):
            return better
        return other


@dataclass(frozen=True, slots=True)
class _Learned:
    """The success rate that the records of a node speak of, and when the last one came."""

    success_rate: float
    at_s: float
