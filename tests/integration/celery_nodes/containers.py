"""What pytest-celery drives: nodes and a Redis, as containers or as processes of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, Protocol

from pytest_celery import CeleryTestWorker, CeleryWorkerContainer, RedisContainer

from tests.waiting import wait_until

STOP_S = 120.0
EXEC_S = 60.0


class LocalProcess(Protocol):
    """What a ``WorkerProcess`` and a ``RedisServer`` have in common."""

    @property
    def pid(self) -> int: ...
    def start(self) -> object: ...
    def stop(self) -> object: ...


class ProcessAsContainer:
    """A process behind the part of a Docker container that pytest-celery uses. Its log outlives restarts, too.

    ``runs`` tells whether it does. Commands of ``exec_run`` find ``directory`` and ``environ`` as they would in the
    container.
    """

    def __init__(
        self, name: str, process: LocalProcess, log: Path, runs: Callable[[], bool], *, directory: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.id = self.name = name
        # No network and no port of its own: those are this machine's.
        self.attrs: dict[str, Any] = {"Config": {"Hostname": name}, "NetworkSettings": {"Networks": {}, "Ports": {}}}
        self._process, self._log, self._runs = process, log, runs
        self._directory, self._environ = directory, environ or {}
        self.reload()

    def reload(self) -> None:
        """See how the process is now."""
        self.status = "running" if self._runs() else "exited"

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal, by name or number; SIGKILL, the default, returns when the process has ended."""
        number = Signals[signal] if isinstance(signal, str) else Signals(signal or SIGKILL)
        os.kill(self._process.pid, number)
        if number is SIGKILL:
            wait_until(lambda: not self._runs(), STOP_S, f"{self.name} ends")

    def restart(self, timeout: int) -> None:
        """End it in order if it runs, and start it again. How long it may take to end is the process' own matter."""
        self._process.stop()
        self._process.start()

    def logs(self) -> bytes:
        """Everything it has logged."""
        return self._log.read_bytes()

    def exec_run(self, command: str | Sequence[str]) -> tuple[int, bytes]:
        """Run a command beside the process; return its exit code and what it wrote."""
        words = shlex.split(command) if isinstance(command, str) else command
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environ = {**os.environ, **self._environ, "PATH": path}
        done = subprocess.run(
            words, cwd=self._directory, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=EXEC_S
        )
        return done.returncode, done.stdout


class RedisOnProcess(RedisContainer):  # type: ignore[misc]
    """A Redis that is a process: nodes and tests reach it at the same address."""

    def __init__(self, container: ProcessAsContainer, url: str) -> None:
        super().__init__(container)
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    @property
    def host_url(self) -> str:
        return self._url

    @property
    def port(self) -> int:
        return int(self._url.rpartition(":")[2].partition("/")[0])


class NodeContainer(CeleryWorkerContainer):  # type: ignore[misc]
    """A worker that is a node. It is told where Redis is; which queues it consumes is the cluster's choice."""

    @classmethod
    def command(cls, *args: str, **kwargs: Any) -> list[str]:
        name = f"{cls.worker_name()}@%h"
        return ["celery", "-A", "jobs", "worker", "-n", name, "-c", "2", "-l", cls.log_level(), *args]

    @classmethod
    def initial_env(cls, celery_worker_cluster_config: dict[str, Any], initial: Any = None) -> dict[str, str]:
        (url,) = celery_worker_cluster_config["celery_broker_cluster_config"]["urls"]
        return {**(initial or {}), "CLUSTER_BROKER_URL": url}


class NodeOnProcess(CeleryTestWorker):  # type: ignore[misc]
    """A node that is a process: many of them share one host name, so its id is its name."""

    def hostname(self) -> str:
        return str(self.name())
