"""The metrics of a whole cluster, from its coordinator and from Flower."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from benchmarks.forks import Forks
from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.broker.epochs import Limit
from cluster_tasks.errors import ProviderUnavailable, QuarantinedError
from cluster_tasks.gateway.guard import Guard
from cluster_tasks.gateway.shared import Limits
from tests.exposition import Samples, asked_for, names, scrape, value
from tests.process.accounts import END_S, finish
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until
from workers.redis_server import RedisServer, free_port

APP = "tests.process.jobs"


def try_scrape(port: int) -> Samples:
    """Return the samples of a server that may not answer yet."""
    try:
        return scrape(port)
    except OSError:
        return {}


def outcomes(samples: Samples) -> dict[str, float]:
    """The jobs of a scrape by outcome."""
    found = {
        dict(labels)["outcome"]: number for (name, labels), number in samples.items() if name == "cluster_jobs_total"
    }
    return {outcome: number for outcome, number in found.items() if number}


@pytest.mark.timeout(300)
def test_whatever_dashboard_and_rules_ask_for_is_exported_by_the_coordinator_and_by_flower(
    redis_server: RedisServer, new_worker: NewWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {
        "CLUSTER_BROKER_URL": redis_server.url, "CLUSTER_CACHE_URL": redis_server.url.rpartition("/")[0] + "/3",
        # Who ejects nodes would lift the limit below before all were asked for it.
        "CLUSTER_EJECTION": "0",
    }  # fmt: skip
    for name, setting in environ.items():
        monkeypatch.setenv(name, setting)
    port, flower_port = free_port(), free_port()
    jobs = make_jobs()
    node = new_worker("node", pool="threads", environ=environ)
    with running(node), Forks(tmp_path) as others:
        others.celery("chief", APP, "cluster", "coordinator", "-n", "chief@test", CLUSTER_METRICS_PORT=str(port))
        others.celery("flower", APP, "flower", "--address=127.0.0.1", f"--port={flower_port}")
        results = [jobs.work.delay(0.01, key=str(number)) for number in range(20)]
        assert finish(results) == {node.id: 20}
        # What a healthy cluster has none of.
        cluster = jobs.cluster
        guard = Guard(cluster.neighbourhood, "gpt", BreakerPolicy(failure_threshold=1, window=2), Limits(), 0.0)
        with pytest.raises(ProviderUnavailable):
            guard.send(unavailable, 1, lambda _: 0)
        cluster.cache.get_or_compute("key", lambda: b"value")
        cluster.cache.get("key")
        cluster.caches.flush()
        cluster.epochs.limit(node.id, cluster.epochs.beats()[node.id].epoch, None, Limit.read("1 ramping t 2"))
        asked = set().union(*asked_for().values())
        for served in (port, flower_port):
            told = scrape_that_has(served, asked, 20)
            assert outcomes(told) == {"succeeded": 20}
            assert value(told, "cluster_job_run_seconds_count", type="llm") == 20
            assert value(told, "cluster_job_wait_seconds_count", type="llm") == 20
            assert value(told, "cluster_node_jobs_total", node=node.id, type="llm", outcome="succeeded") == 20
            assert value(told, "cluster_node_slots", node=node.id) == 2
            assert value(told, "cluster_coordinators") == 1
    jobs.app.close()


def scrape_that_has(port: int, asked: set[str], succeeded: int) -> Samples:
    """Wait for a scrape with all these names, in which so many jobs have succeeded."""
    told: Samples = {}

    def is_complete() -> bool:
        told.update(try_scrape(port))
        return asked <= names(told) and outcomes(told).get("succeeded") == succeeded

    try:
        wait_until(is_complete, END_S)
    finally:
        assert asked - names(told) == set(), "they are asked for, and not exported"
    return told


def unavailable() -> None:
    """Answer as a provider that is down."""
    raise ProviderUnavailable("it is down")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_jobs_are_counted_by_how_they_end_and_the_sums_outlive_their_nodes(
    jobs: Jobs, new_worker: NewWorker, tmp_path: Path, pool: str
) -> None:
    port = free_port()
    first, second = new_worker("first", pool=pool), new_worker("second", pool=pool)
    with running(first, second), Forks(tmp_path) as others:
        others.celery("chief", APP, "cluster", "coordinator", "-n", "chief@test", CLUSTER_METRICS_PORT=str(port))
        ended = [jobs.work.delay(0.01, key=str(number)) for number in range(10)]
        ended += [jobs.flaky.delay(2), jobs.silent.delay(0.0)]
        fails = [jobs.verbose.delay(10, 0.0) for _ in range(3)]
        revoked = jobs.work.apply_async(countdown=3600)
        jobs.app.control.revoke(revoked.id)
        late = jobs.work.apply_async(expires=-1)
        for each in ended[:-1]:
            each.get(timeout=END_S)
        for each in fails:
            with pytest.raises(ValueError, match="x"):
                each.get(timeout=END_S)
        if pool == "prefork":
            with pytest.raises(QuarantinedError):
                jobs.fatal.delay().get(timeout=END_S)
        quarantined = {"quarantined": 1} if pool == "prefork" else {}
        expected = {"succeeded": 12, "retried": 2, "failed": 3, "revoked": 1} | quarantined
        wait_until(lambda: outcomes(try_scrape(port)) == expected, END_S, f"{expected} are counted")
        assert late.state == "REVOKED"
        running_on = [jobs.work.delay(8.0, key=f"long {number}") for number in range(2)]

        def busy() -> list[WorkerProcess]:
            told = try_scrape(port)
            held = {node: value(told, "cluster_node_held_jobs", node=node.id, type="llm") for node in (first, second)}
            return [node for node in held if held[node]] if sum(held.values()) == 2 else []

        victim = wait_until(busy, END_S, "two jobs are held")[0]
        victim.signal(signal.SIGKILL)

        def is_told() -> Samples:
            told = try_scrape(port)
            is_gone = told and not any(dict(labels).get("node") == victim.id for _, labels in told)
            moved = value(told, "cluster_moved_jobs_total", reason="failover")
            charged = value(told, "cluster_crash_deliveries_total") - 3 * len(quarantined)
            return told if is_gone and moved and charged > 0 else {}

        lost = wait_until(is_told, END_S, "its loss is counted")
        assert value(lost, "cluster_nodes_lost_total") >= 1
        assert value(lost, "cluster_quarantined_jobs") == len(quarantined)
        assert all(outcomes(lost).get(outcome, 0) >= number for outcome, number in expected.items()), "no sum falls"
        finish(running_on)


def test_what_a_node_has_counted_is_told_before_it_leaves(jobs: Jobs, new_worker: NewWorker) -> None:
    # So that its heartbeat is not what tells it.
    node = new_worker("node", environ={"CLUSTER_HEARTBEAT_S": "30", "CLUSTER_LEASE_S": "120"})
    with running(node):
        finish([jobs.work.delay(0.0, key=str(number)) for number in range(10)])
    counted = jobs.cluster.client.hgetall(jobs.cluster.keys.job_counts)
    assert counted[b"llm ended succeeded"] == b"10"
