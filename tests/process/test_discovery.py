"""Where the registry and the fence disagree, the fence decides: the truth table of docs/failover.md, line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster_tasks.model import Node, NodeStatus
from tests.chaos.levels import RECOVERY
from tests.consul_server import ConsulServer
from tests.etcd_server import EtcdServer
from tests.process.accounts import END_S, finish, held_key
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import running
from tests.servers import redis_for_results
from tests.waiting import wait_until

SERVES = frozenset({"llm"})


class Discovery(NamedTuple):
    """The service that keeps the registry, not the one that keeps the jobs."""

    url: str
    stop: Callable[[], None]
    start: Callable[[], object]
    pid: Callable[[], int]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Take connections and answer nothing, as long as the block lasts."""
        os.kill(self.pid(), signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid(), signal.SIGCONT)


@pytest.fixture(params=["redis", "consul", "etcd"])
def discovery(request: pytest.FixtureRequest, redis_binary: str, tmp_path: Path) -> Iterator[Discovery]:
    """Each of them in turn."""
    directory = tmp_path / "discovery"
    if request.param == "redis":
        with redis_for_results(directory) as kept:
            yield Discovery(kept.url, kept.stop, kept.start, lambda: kept.pid)
    elif request.param == "consul":
        with ConsulServer(directory) as consul:
            yield Discovery(consul.url(), consul.stop, consul.start, lambda: consul.pid)
    else:
        with EtcdServer(directory) as etcd:
            yield Discovery(etcd.url, etcd.stop, etcd.start, lambda: etcd.pid)


@pytest.fixture
def jobs(redis_url: str, discovery: Discovery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test, with its registry in a service of its own."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_url)
    monkeypatch.setenv("CLUSTER_REGISTRY_URL", discovery.url)
    made = make_jobs()
    yield made
    made.app.close()


def known(jobs: Jobs) -> dict[str, str]:
    """Node → epoch, as the registry has them."""
    return {node.id: node.epoch for node in jobs.cluster.registry.list()}


def standing(jobs: Jobs) -> dict[str, str]:
    """Node → epoch, as the fence has them."""
    return {node_id: beat.epoch for node_id, beat in jobs.cluster.epochs.beats().items()}


def send(jobs: Jobs, number: int, seconds: float = 0.05) -> list[object]:
    return [jobs.work.delay(seconds, key=str(key)) for key in range(number)]


def test_a_node_that_discovery_does_not_know_works_and_is_known_again(
    jobs: Jobs, discovery: Discovery, new_worker: NewWorker
) -> None:
    with running(new_worker("a")):
        epochs = standing(jobs)
        discovery.stop()
        with running(new_worker("joiner")):
            by_node = finish(send(jobs, 40, 0.5))
            assert by_node["joiner@test"], "it joined while discovery was away, and works"
            assert by_node["a@test"]
            assert standing(jobs).items() > epochs.items(), "nobody was taken for dead"
            discovery.start()
            wait_until(lambda: known(jobs) == standing(jobs), END_S, "discovery is back and knows them all")
    assert [event.kind for event in jobs.cluster.events.latest() if event.kind == "node lost"] == []


@pytest.mark.timeout(240)
def test_a_discovery_that_is_silent_keeps_nobody_from_joining_and_from_being_noticed_when_dead(
    jobs: Jobs, discovery: Discovery, new_worker: NewWorker
) -> None:
    stays, dies, joins = (new_worker(name) for name in ("stays", "dies", "joins"))
    with running(stays, dies):
        results = send(jobs, 40, 1.0)
        wait_until(lambda: jobs.cluster.client.hlen(held_key(jobs, dies.id)), END_S, "it works")
        with discovery.silent():
            dies.kill()
            with running(joins):
                by_node = finish([*results, *send(jobs, 40, 0.5)])
                assert by_node[joins.id], "it joined, and works"
                lost = [event.facts["node"] for event in jobs.cluster.events.latest() if event.kind == "node lost"]
                assert lost == [dies.id]
        wait_until(lambda: known(jobs) == standing(jobs), END_S, "discovery answers, and knows who is left")


def test_a_node_that_only_discovery_knows_keeps_no_job_and_is_forgotten(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        jobs.cluster.registry.register(Node(id="ghost@test", name="ghost", epoch="1", serves=SERVES))
        wait_until(lambda: "ghost@test" in {node.id for node in jobs.cluster.nodes()}, END_S, "it is placed on")
        placed = jobs.work.apply_async(queue=jobs.cluster.keys.node_queue("ghost@test"))
        assert finish([placed, *send(jobs, 40)]) == {"a@test": 41}
        wait_until(lambda: known(jobs) == standing(jobs), END_S, "the ghost is forgotten")


def test_a_record_of_an_earlier_epoch_gives_way_to_the_epoch_that_stands(jobs: Jobs, new_worker: NewWorker) -> None:
    with running(new_worker("a")):
        jobs.cluster.registry.register(Node(id="a@test", name="a", epoch="0", serves=SERVES))
        assert finish(send(jobs, 20)) == {"a@test": 20}
        wait_until(lambda: known(jobs) == standing(jobs), END_S, "the record is of the epoch that stands")


def test_who_drains_is_what_the_fence_says(jobs: Jobs, new_worker: NewWorker) -> None:
    def says(status: NodeStatus) -> bool:
        return {node.id: node.status for node in jobs.cluster.nodes()}["a@test"] is status

    with running(new_worker("a"), new_worker("b")):
        wait_until(lambda: known(jobs) == standing(jobs), END_S, "discovery knows them")
        jobs.cluster.drain("a@test")
        jobs.cluster.registry.set_status("a@test", NodeStatus.ONLINE)
        assert says(NodeStatus.DRAINING)
        assert finish(send(jobs, 20)) == {"b@test": 20}
        jobs.cluster.resume("a@test")
        jobs.cluster.drain("b@test")
        jobs.cluster.registry.set_status("a@test", NodeStatus.DRAINING)
        assert says(NodeStatus.ONLINE)
        assert finish(send(jobs, 20)) == {"a@test": 20}


# Of a registry in Redis the demo itself is the test: tests/process/test_machine.py.
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("discovery", ["consul", "etcd"], indirect=True)
def test_the_demo_ends_as_well_with_each_registry(
    discovery: Discovery, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    corpus = str(Path(__file__).parents[2] / "docs")
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "demo", "--json", "--jobs", "200", "--corpus", corpus]
    environ = {**os.environ, "TMPDIR": str(tmp_path), "CLUSTER_REGISTRY_URL": discovery.url}
    done = subprocess.run(command, env=environ, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert (told["failed"], told["lost"], told["committed_twice"]) == (0, 0, 0)
    assert told["held_by_killed_node"] > 0
    record_property(RECOVERY, [(told["detected_after_s"], told["reowned_after_s"])])
