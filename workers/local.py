"""A cluster on one machine: Redis, nodes, a coordinator and Flower, kept running. ``cluster-tasks up`` runs this."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from celery.app.utils import find_app
from celery.utils.nodenames import host_format

from cluster_tasks.cluster import cluster_of
from cluster_tasks.errors import BrokerUnavailable, ClusterError, ConfigurationError
from cluster_tasks.redis_store import foreign_errors
from workers.autoscale import Autoscaler
from workers.redis_server import HOST, RedisServer, free_port
from workers.scaling import ScalePolicy
from workers.supervision import NUMBER, Program, Supervisor

logger = logging.getLogger(__name__)

NODE = "node"
SPARE = "spare"
"""The group of the nodes that are started when there is more to do."""
COORDINATOR = "coordinator"
REDIS_PORT = 6379
FLOWER_PORT = 5555
FLOWER_USER = "cluster"
POOLS = ("prefork", "threads", "solo")
JOIN_TIMEOUT_S = 60.0
BEYOND_DRAIN_S = 15.0
"""For a node to hand back what has not ended, and to exit."""
LOOK_EVERY_S = 0.2
CACHE_CONFIGURATION = ("maxmemory 256mb", "maxmemory-policy allkeys-lru")
STRATEGY_SETTINGS = ("strategy", "strategy_llm", "strategy_retrieval", "strategy_embedding")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run. A port that somebody holds is replaced by a free one."""

    directory: Path
    """Holds Redis' data, the ``logs`` and the collections."""
    nodes: int = 3
    app: str = "cluster_tasks"
    pool: str = "prefork"
    concurrency: int = 2
    """Jobs at a time on each node."""
    strategy: str = ""
    """For all request types; empty: as set elsewhere."""
    broker_url: str = ""
    """A Redis that runs already; empty: one is started on the loopback."""
    redis_port: int = 0
    """0: any."""
    cache: bool = True
    """Whether a Redis for the cache is started beside the one for the queues, unless the settings name one."""
    flower_port: int = 0
    """0: no Flower."""
    restart: bool = True
    """Whether a node that dies is started again."""
    most_nodes: int = 0
    """So many are started when jobs wait; at most ``nodes``: only those are run."""
    scale_down_after_s: float = 60.0
    """For so long fewer nodes must be enough before one of these ends."""


class LocalCluster:
    """A cluster as planned, from ``start`` to ``stop``; no process of it outlives this one, however that ends.

    ``start`` sets the ``CLUSTER_*`` variables of this process, so that the app, which must not be in use before, and
    whatever is started from here find the cluster.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.directory = plan, plan.directory.absolute()
        if "%" in str(self.directory):
            raise ConfigurationError(f"supervisord cannot work in a folder with % in its name: {self.directory}")
        self.redis: RedisServer | None = None
        """The Redis that was started, if any."""
        self.cache: RedisServer | None = None
        """That of the cache, which may forget."""
        self.flower_port = 0
        """Where Flower listens; 0: nowhere."""
        self._running = ExitStack()
        self._earlier: dict[str, str] = {}
        self._scaler: Autoscaler | None = None
        self._tell: Callable[[str], None] = logger.info

    def start(self) -> None:
        """Start everything; nodes still have to join. Raises ClusterError, and then nothing runs."""
        with ExitStack() as running:
            running.enter_context(_locked(self.directory))
            if not self.plan.broker_url:
                server = RedisServer(self.directory / "redis", _free_or_other(self.plan.redis_port), appendonly=True)
                self.redis = running.enter_context(server)
            if self.redis and self.plan.cache and not os.environ.get("CLUSTER_CACHE_URL"):
                self.cache = running.enter_context(RedisServer(self.directory / "cache", extra=CACHE_CONFIGURATION))
            os.environ |= {"CLUSTER_BROKER_URL": self.plan.broker_url} | self.variables()
            try:
                self.app = find_app(self.plan.app)
            except (ImportError, AttributeError) as exc:
                raise ConfigurationError(f"there is no Celery app {self.plan.app!r}: {exc}") from None
            self.cluster = cluster_of(self.app)
            self._check()
            self._earlier = self._epochs()
            if password := self.cluster.settings.flower_password:
                # Not by its command line, which is for everybody to read.
                os.environ["FLOWER_BASIC_AUTH"] = f"{FLOWER_USER}:{password.get_secret_value()}"
            self.flower_port = _free_or_other(self.plan.flower_port)
            self._scaler = self._autoscaler()
            self.supervisor = running.enter_context(Supervisor(self.directory, self._programs()))
            self._running = running.pop_all()

    def stop(self) -> None:
        """Drain the nodes, then end the others, Redis last. Safe before a start and twice."""
        if self.cache:
            # It has to count before that is gone.
            self.cluster.caches.close()
        self._running.close()

    def missing(self) -> list[str]:
        """Return the names of the nodes, coordinator included, that have not joined yet. Raises UnavailableError."""
        epochs = self._epochs()
        return [name for name in self._names() if epochs.get(name) == self._earlier.get(name)]

    def wait_for_all(self, within_s: float = JOIN_TIMEOUT_S) -> list[str]:
        """Wait until all have joined; return those that have not ``within_s``. Raises ClusterError if none can."""
        deadline = time.monotonic() + within_s
        while (missing := self.missing()) and time.monotonic() < deadline:
            if not self.supervisor.running:
                raise ClusterError(f"supervisord has ended; see {self.directory}/logs/supervisord.out")
            time.sleep(LOOK_EVERY_S)
        return missing

    def keep_running(self, tell: Callable[[str], None]) -> None:
        """Start again what dies, and scale as planned, until this is interrupted; ``tell`` of it."""
        self._tell = tell
        while True:
            time.sleep(LOOK_EVERY_S)
            for name, server in (("Redis", self.redis), ("The Redis of the cache", self.cache)):
                if server and not server.running:
                    tell(f"{name} has died and is started again")
                    try:
                        server.start()
                    except BrokerUnavailable as exc:
                        tell(str(exc))
            if not self.supervisor.running:
                tell("supervisord has died and is started again")
                self.supervisor.start()
            elif self._scaler:
                self._scaler.look()

    def variables(self) -> dict[str, str]:
        """Return the variables by which other commands find this cluster; its Redis only if it was started here."""
        variables = {"CLUSTER_DATA_DIR": str(self.directory)}
        if self.redis:
            variables["CLUSTER_BROKER_URL"] = self.redis.url
        if self.cache:
            variables["CLUSTER_CACHE_URL"] = self.cache.url
        if self.plan.strategy:
            variables |= {f"CLUSTER_{name.upper()}": self.plan.strategy for name in STRATEGY_SETTINGS}
        return variables

    def node_id(self, name: str) -> str:
        """Return the id of the node ``name``, such as ``node1``."""
        return local_node_id(name)

    def last_words(self, name: str) -> str:
        """Return the end of the log of a program."""
        return last_words(self.directory, name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _check(self) -> None:
        settings = self.cluster.settings
        self.cluster.check()
        with foreign_errors(BrokerUnavailable, f"connecting to {settings.broker_url}"):
            self.cluster.client.ping()

    def _names(self) -> list[str]:
        return [*(f"{NODE}{number}" for number in range(1, self.plan.nodes + 1)), COORDINATOR]

    def _epochs(self) -> dict[str, str]:
        names = {self.node_id(name): name for name in self._names()}
        return {names[node.id]: node.epoch for node in self.cluster.nodes() if node.id in names}

    def _autoscaler(self) -> Autoscaler | None:
        plan = self.plan
        if plan.most_nodes <= plan.nodes:
            return None
        names = {name: self.node_id(name) for name in (f"{NODE}{each}" for each in range(1, plan.most_nodes + 1))}
        slots = 1 if plan.pool == "solo" else plan.concurrency
        policy = ScalePolicy(plan.nodes, plan.most_nodes, slots, down_after_s=plan.scale_down_after_s)
        return Autoscaler(self.cluster, self.directory, policy, names, lambda news: self._tell(news))

    def _programs(self) -> list[Program]:
        plan, celery = self.plan, [sys.executable, "-m", "celery", "-A", self.plan.app]
        node = f"{NODE}{NUMBER}"
        pool = ["--pool", plan.pool, "--concurrency", str(plan.concurrency)]
        nodes = Program(
            node,
            [*celery, "worker", "-n", f"{node}@%h", *pool, "--task-events", "--loglevel", "INFO"],
            priority=3,
            copies=plan.nodes,
            restart=plan.restart,
            stop_timeout_s=self.cluster.settings.drain_timeout_s + BEYOND_DRAIN_S,
        )
        programs = [Program(COORDINATOR, [*celery, "cluster", "coordinator"], priority=2), nodes]
        if (spare := plan.most_nodes - plan.nodes) > 0:
            programs.append(replace(nodes, copies=spare, first=plan.nodes + 1, group=SPARE, started=False))
        if self.flower_port:
            where = [f"--address={HOST}", f"--port={self.flower_port}"]
            programs.append(Program("flower", [*celery, "flower", *where], priority=1))
        return programs


def local_node_id(name: str) -> str:
    """Return the id of a node of this machine, such as ``node1``."""
    return str(host_format(f"{name}@%h"))


def last_words(directory: Path, name: str) -> str:
    """Return the end of the log of a program of the cluster in ``directory``."""
    log = directory / "logs" / f"{name}.log"
    return " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]) if log.exists() else ""


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock_file = (directory / "up.lock").open("w")
    except OSError as exc:
        raise ConfigurationError(f"--data-dir {directory} cannot be used ({exc.strerror}): choose another") from exc
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another cluster runs in {directory}: choose another --data-dir") from None
        yield


def _free_or_other(port: int) -> int:
    """Return ``port`` if nobody listens there, else a free one; 0 stays 0."""
    if not port:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return free_port()
    return port
