"""``celery -A APP cluster registry check`` and ``nodes --follow``, with each registry, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_tasks import Node
from cluster_tasks.model import NodeStatus
from tests.consul_server import ConsulServer
from tests.etcd_server import KEPT, EtcdServer
from tests.process.jobs import Jobs, make_jobs
from workers.redis_server import RedisServer, free_port

END_S = 120.0
COMMAND = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster"]
NewJobs = Callable[[str], Jobs]


@pytest.fixture
def new_jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewJobs]:
    """Makes the app under test with a registry; the commands of the test find it, too."""
    made: list[Jobs] = []

    def make(registry_url: str) -> Jobs:
        monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
        monkeypatch.setenv("CLUSTER_REGISTRY_URL", registry_url)
        made.append(make_jobs())
        return made[-1]

    yield make
    for jobs in made:
        jobs.app.close()


@pytest.fixture(params=["redis", "consul", "etcd"])
def registry_url(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Iterator[str]:
    """Of each registry in turn."""
    if request.param == "redis":
        yield redis_url
    elif request.param == "consul":
        with ConsulServer(tmp_path / "consul") as consul:
            yield consul.url()
    else:
        with EtcdServer(tmp_path / "etcd") as etcd:
            yield f"{etcd.url}?{KEPT}"


def check() -> tuple[int, dict[str, dict[str, object]]]:
    """Run the command; return its exit code and its findings by check."""
    command = [*COMMAND, "registry", "check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_a_registry_that_works_passes_every_check(new_jobs: NewJobs, registry_url: str) -> None:
    jobs = new_jobs(registry_url)
    code, found = check()
    assert (code, list(found)) == (0, ["list", "register", "report", "deregister", "clocks"]), found
    assert all(finding["ok"] and not finding["remedy"] for finding in found.values())
    assert list(jobs.cluster.registry.list()) == [], "nothing of it is left"


def test_a_registry_that_does_not_answer_is_told_with_what_to_do(new_jobs: NewJobs) -> None:
    port = free_port()
    new_jobs(f"redis://:secret@127.0.0.1:{port}/0")
    code, found = check()
    assert (code, list(found)) == (1, ["list"])
    told = f"{found['list']['found']} {found['list']['remedy']}"
    assert f"127.0.0.1:{port}" in told
    assert "correct its address" in told
    assert "secret" not in told


def test_a_token_that_may_not_write_is_told_with_the_permission_that_it_lacks(
    new_jobs: NewJobs, tmp_path: Path
) -> None:
    with ConsulServer(tmp_path / "consul", acl=True) as consul:
        reader = consul.token('key_prefix "" { policy = "read" } service_prefix "" { policy = "read" }')
        new_jobs(consul.url(token=reader))
        code, found = check()
        assert (code, list(found)) == (1, ["list", "register", "clocks"])
        assert 'policy = "write"' in str(found["register"]["found"])
        assert found["register"]["remedy"]
        assert reader not in str(found)


def test_a_clock_that_is_wrong_is_told(new_jobs: NewJobs, redis_url: str) -> None:
    jobs = new_jobs(redis_url)
    jobs.cluster.registry.register(Node(id="a@host", name="a", epoch="1", last_seen=jobs.cluster.clock.time() + 180))
    code, found = check()
    assert code == 1
    assert re.match(r"a@host is 1\d\d s ahead", str(found["clocks"]["found"]))


def test_nodes_are_watched_until_interrupted(new_jobs: NewJobs, registry_url: str) -> None:
    registry = new_jobs(registry_url).cluster.registry
    serves = frozenset({"llm"})
    registry.register(Node(id="a@host", name="a", epoch="1", serves=serves))
    command = [*COMMAND, "nodes", "--follow", "--type", "llm", "--json"]
    with subprocess.Popen(command, env=os.environ, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = lambda: json.loads(process.stdout.readline())  # type: ignore[union-attr]  # noqa: E731
        try:
            assert (told()["node"]["id"]) == "a@host"
            registry.register(Node(id="other@host", name="other", epoch="1"))
            registry.register(Node(id="b@host", name="b", epoch="1", serves=serves))
            registry.set_status("b@host", NodeStatus.DRAINING)
            registry.deregister("a@host", "1")
            events = [told() for _ in range(3)]
            seen = [(event["type"], event["node"]["id"], event["node"]["status"]) for event in events]
            assert seen == [
                ("joined", "b@host", "online"), ("updated", "b@host", "draining"), ("left", "a@host", "online"),
            ]  # fmt: skip
            process.send_signal(signal.SIGINT)
            assert process.wait(END_S) == 128 + signal.SIGINT
        finally:
            process.kill()
