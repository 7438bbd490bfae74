"""A snapshot in the words of Prometheus. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cluster_tasks.breaker import Phase
from cluster_tasks.keys import ANY_TYPE
from cluster_tasks.metrics.counts import Histogram, Outcome
from cluster_tasks.metrics.snapshot import BrokerState, Snapshot
from cluster_tasks.model import Node, NodeStatus

Labels = Sequence[str]
MIB = 2**20
COARSE = 3
"""So many buckets are one where there is a histogram for each node: hundreds of them take their time to be told."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A metric as it is told: the names of counters without their ``_total``."""

    kind: type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]
    name: str
    labels: Labels
    help: str

    def family(self) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
        """Return it without samples."""
        return self.kind(self.name, self.help, labels=self.labels)


_C, _G, _H = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
SPECS = (
    Spec(_G, "cluster_up", (), "Whether the Redis of the broker answered this scrape."),
    Spec(_G, "cluster_registry_up", (), "Whether the registry of nodes answered this scrape."),
    Spec(_G, "cluster_cache_up", (), "Whether the cache answered this scrape."),
    Spec(_G, "cluster_lease_seconds", (), "A node that does not beat for so long may be fenced."),
    Spec(_G, "cluster_nodes", ("status",), "Nodes that stand, by the status that they reported."),
    Spec(_G, "cluster_coordinators", (), "Coordinators that stand."),
    Spec(_G, "cluster_serving_nodes", ("type",), "Nodes that serve a request type and are given jobs."),
    Spec(_C, "cluster_health_checks", (), "Health checks that coordinators have run."),
    Spec(_C, "cluster_nodes_lost", (), "Nodes that were fenced because they did not beat."),
    Spec(_G, "cluster_unfinished_failovers", (), "Epochs that have ended and whose jobs are not all moved."),
    Spec(_C, "cluster_jobs", ("type", "outcome"), "Jobs by how they ended, on all nodes that ever were."),
    Spec(_H, "cluster_job_run_seconds", ("type",), "Time from the start of jobs to their end."),
    Spec(_H, "cluster_job_wait_seconds", ("type",), "Time that jobs waited, from when they were sent or due."),
    Spec(_G, "cluster_waiting_jobs", ("type",), "Jobs that have no node."),
    Spec(_G, "cluster_suspect_jobs", ("type",), "Jobs without a node that ran when a process died."),
    Spec(_G, "cluster_delayed_jobs", (), "Jobs whose time has not come."),
    Spec(_G, "cluster_quarantined_jobs", (), "Jobs in quarantine."),
    Spec(_G, "cluster_undecodable_messages", (), "Messages kept that nobody could read."),
    Spec(_C, "cluster_moved_jobs", ("reason",), "Jobs that were moved to other nodes."),
    Spec(_C, "cluster_crash_deliveries", (), "Deliveries of jobs that ended with the death of a node or process."),
    Spec(_C, "cluster_stale_commits", (), "Ends of jobs that were refused."),
    Spec(_C, "cluster_node_beats", ("node",), "Heartbeats of the epoch of a node."),
    Spec(_G, "cluster_node_slots", ("node",), "Jobs that a node runs at a time."),
    Spec(_G, "cluster_node_held_jobs", ("node", "type"), "Jobs that a node runs or has reserved."),
    Spec(_G, "cluster_node_queued_jobs", ("node",), "Jobs in the list of a node."),
    Spec(_G, "cluster_node_draining", ("node",), "Whether nothing new is placed on a node."),
    Spec(_G, "cluster_node_limit_slots", ("node", "phase"), "Jobs that a node with a limit may hold, and why no more."),
    Spec(_C, "cluster_node_jobs", ("node", "type", "outcome"), "Jobs by how they ended on a node that stands."),
    Spec(_H, "cluster_node_job_run_seconds", ("node", "type"), "Time from the start of jobs on a node to their end."),
    Spec(_G, "cluster_node_cpu_ratio", ("node",), "Share of the machine of a node that is in use."),
    Spec(_G, "cluster_node_memory_bytes", ("node",), "Memory of a node and its pool."),
    Spec(_G, "cluster_node_success_ratio", ("node",), "Share of the last jobs of a node that did not fail."),
    Spec(_G, "cluster_breaker_state", ("provider", "state"), "1 for the state that the breaker of a provider is in."),
    Spec(_C, "cluster_provider_requests", ("provider", "outcome"), "Requests to a provider; unknown: given up."),
    Spec(_C, "cluster_cache_hits", ("tier",), "Values that a tier of the cache had."),
    Spec(_C, "cluster_cache_misses", ("tier",), "Values that a tier of the cache did not have."),
    Spec(_C, "cluster_cache_evictions", ("tier",), "Values that a tier of the cache let go for want of room."),
    Spec(_C, "cluster_cache_served_bytes", ("tier",), "Bytes of the values that a tier of the cache had."),
    Spec(_C, "cluster_cache_saved_seconds", ("tier",), "Time that those had taken to compute."),
    Spec(_C, "cluster_cache_computed", (), "Values that were computed because no tier had them."),
    Spec(_C, "cluster_cache_computed_seconds", (), "Time that this took."),
    Spec(_C, "cluster_cache_errors", (), "Requests that the cache did not answer."),
)
_BY_TIER = {
    "cluster_cache_hits": "hits",
    "cluster_cache_misses": "misses",
    "cluster_cache_evictions": "evictions",
    "cluster_cache_served_bytes": "bytes",
    "cluster_cache_saved_seconds": "saved_s",
}
_OF_CACHE = {
    "cluster_cache_computed": "values.computed",
    "cluster_cache_computed_seconds": "values.computed_s",
    "cluster_cache_errors": "redis.errors",
}


def empty_families() -> list[Metric]:
    """Return all metrics without samples: their names and what they mean."""
    return [spec.family() for spec in SPECS]


def families(snapshot: Snapshot) -> list[Metric]:
    """Return all metrics of a snapshot. What is not known has no samples, and is not zero."""
    told = _Told()
    told.number("cluster_up", snapshot.broker is not None)
    told.number("cluster_registry_up", snapshot.registered is not None)
    told.number("cluster_lease_seconds", snapshot.lease_s)
    if snapshot.broker is not None:
        _tell_jobs(told, snapshot.broker)
        _tell_nodes(told, snapshot.broker)
        _tell_providers(told, snapshot.broker)
        if snapshot.registered is not None:
            _tell_reports(told, snapshot.broker, snapshot.registered)
    if snapshot.has_cache:
        told.number("cluster_cache_up", snapshot.cache is not None)
        if snapshot.cache is not None:
            _tell_cache(told, snapshot.cache)
    return told.families()


class _Told:
    """The families on their way."""

    def __init__(self) -> None:
        self._families = {spec.name: spec.family() for spec in SPECS}

    def number(self, name: str, value: float, *labels: str) -> None:
        """Add a sample of a counter or a gauge."""
        family = self._families[name]
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, float(value))

    def histogram(self, name: str, histogram: Histogram, *labels: str, every: int = 1) -> None:
        """Add a histogram, with each bucket or every so many together."""
        family = self._families[name]
        assert isinstance(family, HistogramMetricFamily)
        # From the end: the last one, which has no bound, is always there.
        family.add_metric(labels, histogram.cumulated()[::-every][::-1], histogram.sum_s)

    def families(self) -> list[Metric]:
        """All of them, those without samples too."""
        return list(self._families.values())


def _tell_jobs(told: _Told, broker: BrokerState) -> None:
    for kind, counts in broker.jobs.items():
        # A counter that begins with its first event has no increase.
        for outcome in Outcome:
            told.number("cluster_jobs", counts.outcomes.get(outcome, 0), kind, outcome.value)
        told.histogram("cluster_job_run_seconds", counts.run, kind)
        told.histogram("cluster_job_wait_seconds", counts.wait, kind)
    for kind in _types(broker):
        told.number("cluster_waiting_jobs", broker.waiting.get(kind, 0), kind)
        told.number("cluster_suspect_jobs", broker.suspects.get(kind, 0), kind)
    for why, number in broker.moved.items():
        told.number("cluster_moved_jobs", number, why.value)
    told.number("cluster_delayed_jobs", broker.delayed)
    told.number("cluster_quarantined_jobs", broker.quarantined)
    told.number("cluster_undecodable_messages", broker.undecodable)
    told.number("cluster_unfinished_failovers", broker.unfinished_failovers)
    told.number("cluster_crash_deliveries", broker.crash_deliveries)
    told.number("cluster_stale_commits", broker.stale_commits)
    told.number("cluster_nodes_lost", broker.nodes_lost)
    told.number("cluster_health_checks", broker.checks)


def _types(broker: BrokerState) -> list[str]:
    """The request types that anybody serves, or has jobs of."""
    served = (kind for node in broker.nodes.values() for kind in node.serves)
    return sorted({*served, *broker.waiting, *broker.suspects, *broker.jobs})


def _tell_nodes(told: _Told, broker: BrokerState) -> None:
    given_jobs = [node for node in broker.nodes.values() if node.is_given_jobs]
    for kind in _types(broker):
        told.number("cluster_serving_nodes", sum(kind in {*node.serves, ANY_TYPE} for node in given_jobs), kind)
    told.number("cluster_coordinators", sum(node.is_coordinator for node in broker.nodes.values()))
    for node_id, node in broker.nodes.items():
        told.number("cluster_node_beats", node.beats, node_id)
        if node.is_coordinator:
            continue
        told.number("cluster_node_queued_jobs", node.queued, node_id)
        told.number("cluster_node_draining", node.draining, node_id)
        if node.limit is not None:
            told.number("cluster_node_limit_slots", node.limit.slots, node_id, node.limit.phase.value)
        for kind, counts in node.jobs.items():
            told.number("cluster_node_held_jobs", counts.held, node_id, kind)
            told.histogram("cluster_node_job_run_seconds", counts.run, node_id, kind, every=COARSE)
            for outcome, number in counts.outcomes.items():
                told.number("cluster_node_jobs", number, node_id, kind, outcome)


def _tell_reports(told: _Told, broker: BrokerState, registered: Iterable[Node]) -> None:
    """What nodes say of themselves to the registry, which may still know of some that are no more."""
    standing = {node_id for node_id, node in broker.nodes.items() if not node.is_coordinator}
    nodes = [node for node in registered if node.id in standing]
    statuses = Counter(NodeStatus.DRAINING if broker.nodes[node.id].draining else node.status for node in nodes)
    for status in NodeStatus:
        told.number("cluster_nodes", statuses[status], status.value)
    for node in nodes:
        told.number("cluster_node_slots", node.capacity.max_connections, node.id)
        told.number("cluster_node_cpu_ratio", node.load.cpu_usage_percent / 100, node.id)
        told.number("cluster_node_memory_bytes", node.load.memory_usage_mb * MIB, node.id)
        told.number("cluster_node_success_ratio", node.load.success_rate, node.id)


def _tell_providers(told: _Told, broker: BrokerState) -> None:
    for name, provider in broker.providers.items():
        for phase in Phase:
            told.number("cluster_breaker_state", provider.phase is phase, name, phase.value)
        for outcome, number in provider.requests.items():
            told.number("cluster_provider_requests", number, name, outcome)


def _tell_cache(told: _Told, sums: Mapping[str, float]) -> None:
    for name, measure in _BY_TIER.items():
        for tier in ("local", "redis"):
            told.number(name, sums.get(f"{tier}.{measure}", 0), tier)
    for name, counted in _OF_CACHE.items():
        told.number(name, sums.get(counted, 0))
