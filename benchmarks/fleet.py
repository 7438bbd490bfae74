"""Many workers of ``benchmarks.sleeping`` at once, which come in an instant and are killed; and who sends them jobs."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, Self

import psutil
import redis
from celery import Celery

from benchmarks.forks import Fork
from benchmarks.sleeping import CLUSTER, READY, REDIS_URL, VARIANT, WORK, make_app
from benchmarks.stage import wait_until
from cluster_tasks.redis_store import connect
from workers.redis_server import RedisServer

START_S = 300.0
"""Hundreds of processes that start share two cores."""
COORDINATOR = "coordinator@fleet"
PATIENCE_S = 60.0
RESULT = "celery-task-meta-"
SUBSCRIPTIONS = 200
"""Celery subscribes to the result of each job that is sent; so often they are given up, for nobody reads them."""


def patient(url: str) -> redis.Redis:
    """A client for who measures: that a Redis under load answers late is a result and no error."""
    return connect(url, socket_timeout=PATIENCE_S, health_check_interval=0)


class Fleet:
    """Workers of one variant on one Redis, each a fork. As a context it kills them all, whatever they are at."""

    def __init__(
        self,
        server: RedisServer,
        variant: str,
        slots: int = 1,
        environ: Mapping[str, str] | None = None,
        app: str = "benchmarks.sleeping",
    ) -> None:
        self._server, self._variant, self._app = server, variant, app
        self._environ = {**os.environ, VARIANT: variant, REDIS_URL: server.url, **(environ or {})}
        self._slots = slots
        self._client: redis.Redis = patient(server.url)
        self._forks: dict[str, Fork] = {}

    @property
    def nodes(self) -> list[str]:
        """The names of the workers that were started and not killed."""
        return list(self._forks)

    def start(
        self, names: Iterable[str], words: Callable[[str], Sequence[str]] = lambda _: (),
        environ: Callable[[str], Mapping[str, str]] = lambda _: {},
    ) -> None:  # fmt: skip
        """Start workers of these names, a process in the pool for each slot; they may not be ready yet.

        ``words`` and ``environ`` are what else the command of each has.
        """
        # Each says little, so that what it writes costs nothing.
        stock = () if self._variant == CLUSTER else ("--without-gossip", "--without-mingle", "--without-heartbeat")
        for name in names:
            command = ["-A", self._app, "worker", "-n", name, "-c", str(self._slots), "-l", "WARNING", *stock]
            log = self._server.directory / f"{self._variant}-{name}.log"
            self._forks[name] = Fork([*command, *words(name)], {**self._environ, **environ(name)}, log)

    def start_coordinator(self, name: str = COORDINATOR) -> None:
        """Start what checks the health of the nodes, as each deployment of a cluster has it."""
        command = ["-A", self._app, "cluster", "coordinator", "-n", name]
        self._forks[name] = Fork(command, self._environ, self._server.directory / f"{name}.log")

    def wait_ready(self) -> None:
        """Wait until all that live consume. Raises TimeoutError, RuntimeError if one has ended."""
        wait_until(self._are_ready, START_S, every_s=0.2)

    def pid(self, name: str) -> int:
        """The process of a worker."""
        return self._forks[name].pid

    def kill(self, *names: str) -> float:
        """SIGKILL them with their pools, as nearly at once as can be; return when, in seconds since 1970."""
        victims = [self._forks.pop(name) for name in names]
        # A process of the pool that is left alone would finish its job.
        pools = list(chain.from_iterable(psutil.Process(victim.pid).children(recursive=True) for victim in victims))
        at = time.time()
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        _kill(pools)
        for victim in victims:
            victim.wait()
        return at

    def family(self) -> list[psutil.Process]:
        """All processes of the fleet."""
        found = []
        for fork in self._forks.values():
            try:
                process = psutil.Process(fork.pid)
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def _are_ready(self) -> bool:
        ready = {int(pid) for pid in self._members()}
        for name, fork in self._forks.items():
            if fork.poll() is not None:
                raise RuntimeError(f"{name} ended with {fork.returncode}: {fork.read_log()[-2000:]}")
        return all(fork.pid in ready for fork in self._forks.values())

    def _members(self) -> set[bytes]:
        members: Any = self._client.smembers(READY)
        return members

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self.family())
        for fork in self._forks.values():
            fork.wait()
        self._client.close()


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(frozen=True, slots=True)
class Sent:
    """A job as it was asked for."""

    job_id: str
    at: float
    """When it was sent, in seconds since 1970."""
    seconds: float
    """How long it takes where nothing is warm."""


@dataclass(frozen=True, slots=True)
class Done:
    """A job that has ended, as its result says."""

    sent: Sent
    ended: float
    """In seconds since 1970, by Celery's own word in the result: to measure costs the worker nothing."""
    begun: float
    node: str
    warm: bool

    @property
    def waited_s(self) -> float:
        """Seconds from the call to the end."""
        return self.ended - self.sent.at

    @property
    def slowdown(self) -> float:
        """How many times as long it took as it would have on a free, cold worker."""
        return self.waited_s / self.sent.seconds


class Client:
    """Sends jobs of one variant and reads how they ended. Not to be shared by threads."""

    def __init__(self, url: str, variant: str, app: Celery | None = None) -> None:
        self.app = app or make_app(variant, url)
        self._redis: redis.Redis = patient(url)
        self._sent = 0
        # Its view of the nodes is refreshed for some seconds yet when the Redis of a benchmark is gone.
        logging.getLogger("cluster_tasks.router").setLevel(logging.ERROR)

    def send(self, seconds: float, key: str = "", **options: Any) -> Sent:
        """Send a job that sleeps; ``options`` are those of ``apply_async``."""
        self._sent += 1
        if self._sent % SUBSCRIPTIONS == 0:
            self.forget()
        at = time.time()
        result = self.app.tasks[WORK].apply_async((seconds, key), **options)
        return Sent(result.id, at, seconds)

    def ended(self, jobs: Sequence[Sent]) -> int:
        """How many of them have ended."""
        return sum(self._redis.exists(*names) for names in _in_parts([RESULT + job.job_id for job in jobs]))  # type: ignore[misc]

    def done(self, jobs: Sequence[Sent]) -> list[Done]:
        """Those that have ended. Raises RuntimeError if one has failed."""
        found: list[Done] = []
        for part in _in_parts(jobs):
            stored: Any = self._redis.mget([RESULT + job.job_id for job in part])
            found += [_done(job, json.loads(text)) for job, text in zip(part, stored, strict=True) if text]
        return found

    def forget(self) -> None:
        """Give up the subscriptions to results."""
        self.app.backend.result_consumer.on_after_fork()

    def close(self) -> None:
        """Give up all connections."""
        self.forget()
        self.app.close()
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Steady:
    """Sends jobs of one length at random instants, so many in a second, while the block lasts."""

    def __init__(self, client: Client, per_s: float, seconds: float, rng: random.Random) -> None:
        self._client, self._per_s, self._seconds, self._rng = client, per_s, seconds, rng
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.jobs: list[Sent] = []
        """What was sent. Grows."""

    def _run(self) -> None:
        try:
            due_s = time.monotonic()
            while not self._stopping.is_set():
                due_s += self._rng.expovariate(self._per_s)
                self._stopping.wait(max(0.0, due_s - time.monotonic()))
                self.jobs.append(self._client.send(self._seconds))
        except BaseException as exc:
            self._error = exc
            raise

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise RuntimeError("the load broke off") from self._error


def _done(job: Sent, meta: Mapping[str, Any]) -> Done:
    if meta["status"] != "SUCCESS":
        raise RuntimeError(f"job {job.job_id} ended with {meta['status']}: {meta['result']}")
    told = meta["result"]
    ended = datetime.fromisoformat(meta["date_done"]).timestamp()
    return Done(job, ended, told["begun"], told["node"], told["warm"])


def _in_parts(items: Sequence[Any], of: int = 500) -> Iterable[Sequence[Any]]:
    return (items[begin : begin + of] for begin in range(0, len(items), of))


def pace(at_s: float, begun_s: float) -> None:
    """Sleep until so many seconds after ``begun_s`` on the monotonic clock; not at all if that is over."""
    if (left_s := begun_s + at_s - time.monotonic()) > 0:
        time.sleep(left_s)
