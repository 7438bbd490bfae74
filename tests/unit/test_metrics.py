"""The metrics without a server: what is counted, how it is told, and in time."""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster_tasks.breaker import Phase
from cluster_tasks.broker.epochs import Limit
from cluster_tasks.broker.placement import Why
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.metrics.collector import ClusterCollector
from cluster_tasks.metrics.counts import BUCKETS_S, Counts, Histogram, JobCounts, Outcome, read_counts
from cluster_tasks.metrics.families import SPECS
from cluster_tasks.metrics.snapshot import BrokerState, NodeState, ProviderState
from cluster_tasks.model import Capacity, Load, Node, NodeStatus
from tests.exposition import ROOT, Samples, asked_for, names, parse, value
from tests.exposition import scrape as exported
from workers.counting import waited_s
from workers.redis_server import free_port
from workers.serving import MetricsServer

NOTHING = BrokerState(
    nodes={}, jobs={}, waiting={}, suspects={}, delayed=0, quarantined=0, undecodable=0, unfinished_failovers=0,
    moved=dict.fromkeys(Why, 0), crash_deliveries=0, stale_commits=0, nodes_lost=0, checks=0, providers={},
)  # fmt: skip
Read = Callable[[], Any]


def scrape(broker: Read, registry: Read = list, cache: Read | None = None, limit_s: float = 30.0) -> Samples:
    registry_of_prometheus = CollectorRegistry()
    registry_of_prometheus.register(ClusterCollector(3.0, broker, registry, cache, limit_s))
    return parse(generate_latest(registry_of_prometheus).decode())


def away() -> BrokerState:
    raise BrokerUnavailable("the test took it away")


def node(**changes: Any) -> NodeState:
    default: dict[str, Any] = {
        "is_coordinator": False, "serves": frozenset({"llm"}), "beats": 7, "queued": 2, "draining": False,
        "limit": None, "jobs": {},
    }  # fmt: skip
    return NodeState(**{**default, **changes})


# Counting


def test_what_was_counted_is_read_again_with_its_buckets() -> None:
    counts = Counts()
    counts.ended("llm", Outcome.SUCCEEDED, run_s=0.005, wait_s=0.0)
    counts.ended("llm", Outcome.SUCCEEDED, run_s=0.0051, wait_s=1e9)
    counts.ended("llm", Outcome.REVOKED)
    counts.ended("ocr", Outcome.FAILED, run_s=700.0)
    stored = {name.encode(): str(number).encode() for name, number in counts.take().items()}
    told = read_counts({**stored, b"batch": b"a 1", b"llm held": b"3"})
    assert told["llm"].outcomes == {"succeeded": 2, "revoked": 1}
    assert told["llm"].run.counts[:3] == (1, 1, 0)
    assert told["llm"].run.sum_s == pytest.approx(0.0101)
    assert (told["llm"].wait.counts[0], told["llm"].wait.counts[-1]) == (1, 1)
    assert (told["llm"].held, told["ocr"].held) == (3, 0)
    assert told["ocr"].run.counts[-1] == 1
    assert counts.take() == {}


def test_buckets_of_another_release_are_counted_where_they_belong() -> None:
    (told,) = read_counts({"llm run 0.3": "2", "llm run 0.005": "1", "llm run 1000": "4", "llm run us": "5"}).values()
    assert told.run.counts[0] == 1
    assert told.run.counts[BUCKETS_S.index(0.5)] == 2
    assert told.run.counts[-1] == 4


def test_a_wait_is_told_from_when_a_job_was_sent_or_due_and_whatever_a_message_claims() -> None:
    now, started_s = time.time(), time.monotonic()
    due = datetime.fromtimestamp(now - 5, UTC)
    assert waited_s({"sent_at": now - 10}, None, started_s) == pytest.approx(10, abs=1)
    assert waited_s({"sent_at": now - 10}, due, started_s) == pytest.approx(5, abs=1)
    assert waited_s({"sent_at": now - 10}, None, started_s - 4) == pytest.approx(6, abs=1), "it has run since"
    assert waited_s({"sent_at": now + 100.0}, None, started_s) == 0, "clocks differ"
    assert [waited_s({"sent_at": claimed}, None, started_s) for claimed in ("soon", None, [])] == [None] * 3
    counts = Counts()
    for claimed in (math.nan, math.inf, -math.inf, -1e308, 10**400, True):
        counts.ended("llm", Outcome.SUCCEEDED, 0.0, waited_s({"sent_at": claimed}, None, started_s))
    assert counts.take()["llm wait us"] < 6 * 30 * 86400 * 1e6 + 1


# Telling


def test_names_follow_the_conventions_of_prometheus() -> None:
    for spec in SPECS:
        assert re.fullmatch(r"cluster(_[a-z]+)+", spec.name)
        assert not spec.name.endswith("_total"), "the client adds it to counters"
        assert spec.help.endswith(".")
        assert set(spec.labels) <= {
            "node", "type", "outcome", "status", "reason", "phase", "provider", "state", "tier",
        }, "a label has few values"  # fmt: skip
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_a_snapshot_is_told_by_node_and_type() -> None:
    ran = Histogram((0, 2, *[0] * (len(BUCKETS_S) - 2), 1), 900.0)
    jobs = {"llm": JobCounts({"succeeded": 3}, ran, held=1)}
    state = {
        "nodes": {
            "a": node(jobs=jobs), "b": node(draining=True), "c": node(limit=Limit.read("0 ejected t 0")),
            "d": node(limit=Limit.read("1 ramping t 2"), serves=frozenset({"ocr"})),
            "chief": node(is_coordinator=True, serves=frozenset()),
        },
        "jobs": jobs, "waiting": {"llm": 4, "nobodys": 1, "any": 2}, "nodes_lost": 2,
        "providers": {"gpt": ProviderState(Phase.HALF_OPEN, {"failure": 5})},
    }  # fmt: skip
    registered = [
        Node(id="a", capacity=Capacity(max_connections=4), load=Load(cpu_usage_percent=50), status=NodeStatus.BUSY),
        Node(id="b"), Node(id="gone"),
    ]  # fmt: skip
    told = scrape(lambda: BrokerState(**{**_fields(NOTHING), **state}), lambda: registered)
    assert value(told, "cluster_up") == 1
    assert {kind: value(told, "cluster_serving_nodes", type=kind) for kind in ("llm", "ocr", "any", "nobodys")} == {
        "llm": 1, "ocr": 1, "any": 2, "nobodys": 0,
    }  # fmt: skip
    assert value(told, "cluster_coordinators") == 1
    assert value(told, "cluster_nodes", status="busy") == value(told, "cluster_nodes", status="draining") == 1
    assert value(told, "cluster_nodes", status="online") == 0, "one that does not stand is none"
    assert value(told, "cluster_node_held_jobs", node="a", type="llm") == 1
    assert value(told, "cluster_node_slots", node="a") == 4
    assert value(told, "cluster_node_limit_slots", node="d", phase="ramping") == 1
    assert value(told, "cluster_waiting_jobs", type="nobodys") == 1
    assert value(told, "cluster_nodes_lost_total") == 2
    assert value(told, "cluster_breaker_state", provider="gpt", state="half-open") == 1
    assert value(told, "cluster_breaker_state", provider="gpt", state="closed") == 0
    for name, labels in (("cluster_job_run_seconds", {}), ("cluster_node_job_run_seconds", {"node": "a"})):
        assert value(told, f"{name}_bucket", type="llm", le="0.01", **labels) == 2
        assert value(told, f"{name}_bucket", type="llm", le="120.0", **labels) == 2
        assert value(told, f"{name}_bucket", type="llm", le="+Inf", **labels) == 3
        assert value(told, f"{name}_count", type="llm", **labels) == 3
        assert value(told, f"{name}_sum", type="llm", **labels) == 900
    assert not any(name == "cluster_node_queued_jobs" and ("node", "chief") in labels for name, labels in told)


def _fields(state: BrokerState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in BrokerState.__slots__}


def test_what_is_not_known_is_not_told_as_zero() -> None:
    told = scrape(away, away, away)
    assert told.pop(("cluster_lease_seconds", ())) == 3
    assert told == {("cluster_up", ()): 0, ("cluster_registry_up", ()): 0, ("cluster_cache_up", ()): 0}
    assert "cluster_cache_up" not in names(scrape(lambda: NOTHING))
    told = scrape(lambda: NOTHING, away)
    assert (value(told, "cluster_up"), value(told, "cluster_registry_up")) == (1, 0)
    assert "cluster_nodes" not in names(told)
    assert ("cluster_nodes_lost_total", ()) in told


def test_a_service_that_does_not_answer_holds_up_neither_the_scrape_nor_what_others_know() -> None:
    answer, asked = threading.Event(), []

    def hang() -> list[Node]:
        asked.append(1)
        answer.wait()
        return []

    collector = ClusterCollector(3.0, lambda: NOTHING, hang, None, limit_s=0.2)
    began_s = time.monotonic()
    try:
        for _ in range(3):
            registry = CollectorRegistry()
            registry.register(collector)
            told = parse(generate_latest(registry).decode())
            assert (value(told, "cluster_up"), value(told, "cluster_registry_up")) == (1, 0)
        assert time.monotonic() - began_s < 30
        assert len(asked) == 1, "it is not asked again while it is silent"
    finally:
        answer.set()


def test_a_value_that_cannot_be_read_takes_away_no_other_metric() -> None:
    def broken() -> BrokerState:
        raise ValueError("written by a later release")

    told = scrape(broken)
    assert (value(told, "cluster_up"), value(told, "cluster_registry_up")) == (0, 1)


# Serving


def test_a_server_of_metrics_serves_them_and_frees_its_port() -> None:
    port = free_port()
    server = MetricsServer(ClusterCollector(3.0, lambda: NOTHING, list, None), "127.0.0.1", port)
    server.stop()
    for _ in range(2):
        server.start()
        assert value(exported(port), "cluster_up") == 1
        server.stop()
        server.stop()
        with pytest.raises(OSError, match="refused"):
            exported(port)


def test_a_port_that_is_taken_and_an_address_that_is_none_end_nobody(caplog: pytest.LogCaptureFixture) -> None:
    metrics = ClusterCollector(3.0, lambda: NOTHING, list, None)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("no.such.host.invalid", free_port())):
            server = MetricsServer(metrics, host, port)
            server.start()
            server.stop()
    assert caplog.text.count("CLUSTER_METRICS_PORT") == 2
    MetricsServer(metrics, "127.0.0.1", 0).start()


# What is said of them


def test_every_metric_is_in_the_guide_and_no_other() -> None:
    guide = (ROOT / "docs" / "metrics.md").read_text()
    table = set(re.findall(r"^\| `(cluster_\w+)`", guide, re.MULTILINE))
    assert table == {metric.name + ("_total" if metric.type == "counter" else "") for metric in _empty()}


def test_rules_and_dashboard_ask_for_what_there_is() -> None:
    known = {f"{metric.name}{suffix}" for metric in _empty() for suffix in _suffixes(metric.type)}
    for expression, asked in asked_for().items():
        assert asked <= known, expression


def _empty() -> list[Any]:
    return list(ClusterCollector(3.0, away, list, None).describe())


def _suffixes(kind: str) -> tuple[str, ...]:
    return {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
