"""pytest-celery's fixtures for two nodes and a Redis: processes, and containers too where an engine answers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker  # type: ignore[import-untyped]
import pytest
from celery import Celery
from celery.contrib.testing.app import setup_default_app
from docker.errors import DockerException  # type: ignore[import-untyped]
from pytest_celery import CeleryTestBackend, CeleryTestWorker, CeleryWorkerCluster, RedisContainer, RedisTestBroker
from pytest_docker_tools import build, container, fxtr, volume  # type: ignore[import-untyped]

from tests.integration.celery_nodes import jobs
from tests.integration.celery_nodes.containers import NodeContainer, NodeOnProcess, ProcessAsContainer, RedisOnProcess
from tests.process.nodes import WorkerProcess, running
from workers.redis_server import RedisServer

ROOT = Path(__file__).parents[3]
Nodes = tuple[CeleryTestWorker, ...]


@pytest.fixture(params=["process", "container"])
def place(request: pytest.FixtureRequest) -> str:
    """What the nodes and the Redis of a test are."""
    if request.param == "container":
        request.getfixturevalue("container_engine")
    return str(request.param)


@pytest.fixture(scope="session")
def container_engine() -> None:
    """Skips the test where no container engine answers."""
    refusal = ""
    with warnings.catch_warnings():
        # Docker's client forgets to close the socket of a connection that was refused.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with closing(docker.from_env(timeout=5)) as client:
                client.ping()
        except DockerException as exc:
            refusal = str(exc)
        gc.collect()
    if refusal:
        pytest.skip(f"no container engine answers: {refusal}")


# The setup that tests see


@pytest.fixture
def celery_setup_app(celery_setup_config: dict[str, Any]) -> Iterator[Celery]:
    """The producers' side. pytest-celery makes it the current app when it restarts a node: undone at the end."""
    app = jobs.make_app()
    app.config_from_object(celery_setup_config)
    with setup_default_app(app):
        yield app
        # A result unsubscribes when it is collected: now, while its Redis is there.
        gc.collect()


@pytest.fixture
def redis_container(place: str, request: pytest.FixtureRequest) -> RedisContainer:
    """The Redis of the cluster."""
    return request.getfixturevalue({"process": "redis_process", "container": "default_redis_broker"}[place])


@pytest.fixture
def celery_broker(redis_container: RedisContainer) -> Iterator[RedisTestBroker]:
    """Where jobs are."""
    broker = RedisTestBroker(redis_container)
    yield broker
    broker.teardown()


@pytest.fixture
def celery_backend(redis_container: RedisContainer) -> Iterator[CeleryTestBackend]:
    """Where results are: beside the jobs, for to end a job is one commit."""
    backend = CeleryTestBackend(redis_container)
    yield backend
    backend.teardown()


@pytest.fixture
def nodes(place: str, request: pytest.FixtureRequest) -> Nodes:
    """Two nodes that have joined."""
    joined: Nodes = request.getfixturevalue(f"{place}_nodes")
    return joined


@pytest.fixture
def celery_worker(nodes: Nodes) -> Iterator[CeleryTestWorker]:
    """The first of the nodes."""
    yield nodes[0]
    nodes[0].teardown()


@pytest.fixture
def celery_worker_cluster(nodes: Nodes) -> Iterator[CeleryWorkerCluster]:
    """Both nodes."""
    cluster = CeleryWorkerCluster(*nodes)
    yield cluster
    cluster.teardown()


# On processes


@pytest.fixture
def redis_process(redis_server: RedisServer) -> RedisOnProcess:
    """The Redis of this module."""
    log = redis_server.directory / "redis.log"
    return RedisOnProcess(
        ProcessAsContainer("redis", redis_server, log, lambda: redis_server.running), redis_server.url
    )


@pytest.fixture
def process_nodes(default_worker_env: dict[str, str], default_worker_app: Celery, tmp_path: Path) -> Iterator[Nodes]:
    """Two workers of this machine."""
    url = default_worker_env["CLUSTER_BROKER_URL"]
    workers = [WorkerProcess(name, url, tmp_path, app=jobs.__name__) for name in ("first", "second")]

    def node(worker: WorkerProcess) -> NodeOnProcess:
        process = ProcessAsContainer(
            worker.id, worker, worker.log, lambda: worker.exit_code() is None,
            directory=Path(jobs.__file__).parent, environ={**default_worker_env, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return NodeOnProcess(NodeContainer(process), default_worker_app)

    with running(*workers):
        yield tuple(node(worker) for worker in workers)


# On containers


@pytest.fixture
def default_worker_container_cls() -> type[NodeContainer]:
    """The class that knows the command and the environment of a node."""
    return NodeContainer


@pytest.fixture
def default_redis_broker_image() -> str:
    """The Redis of docker-compose.yml."""
    return "redis:7.2"


node_image = build(path=str(ROOT), tag="cluster-tasks:test")
jobs_volume = volume(initial_content={"jobs.py": Path(jobs.__file__).read_bytes()})


def _node_container() -> Any:
    return container(
        image="{node_image.id}",
        command=fxtr("default_worker_command"),
        environment=fxtr("default_worker_env"),
        network="{default_pytest_celery_network.name}",
        volumes={"{jobs_volume.name}": {"bind": "/jobs", "mode": "ro"}},
        working_dir="/jobs",
        wrapper_class=NodeContainer,
        timeout=60,
    )


first_node_container = _node_container()
second_node_container = _node_container()


@pytest.fixture
def container_nodes(
    first_node_container: NodeContainer, second_node_container: NodeContainer, default_worker_app: Celery
) -> Nodes:
    """Two containers of the image that the Dockerfile builds."""
    return tuple(CeleryTestWorker(each, default_worker_app) for each in (first_node_container, second_node_container))
