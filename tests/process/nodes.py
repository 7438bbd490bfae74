"""Real workers as processes of a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.forks import Fork
from tests.waiting import wait_until

START_S = 120.0
STOP_S = 120.0
NEVER_LOST = {"CLUSTER_LEASE_S": "120"}
"""Environment of nodes that nobody may take for dead, however late this machine is.

One whose beats are late lets its jobs lie, too, and has them delivered again."""

ONLY_WHEN_RUNG: dict[str, Any] = {
    "app": "tests.process.rung",
    "environ": {"CLUSTER_HEARTBEAT_S": "600", "CLUSTER_LEASE_S": "3000", "CLUSTER_AUTO_REBALANCE": "0"},
}
"""Options of nodes that do not look for work by themselves. A beat rings them, too, and lists would be evened out."""


class WorkerProcess:
    """One ``celery`` worker of a test, with a log of its own."""

    def __init__(
        self, name: str, broker_url: str, directory: Path, *, app: str = "tests.process.jobs", pool: str = "prefork",
        slots: int = 2, options: tuple[str, ...] = (), environ: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """``within`` are words before the command."""
        self.id = f"{name}@test"
        self.log = directory / f"{name}.log"
        command = ["-A", app, "worker", "-n", self.id, "-P", pool, "-c", str(slots), "-l", "INFO", *options]
        environ = {"CLUSTER_BROKER_URL": broker_url, **(environ or {})}
        everything = {**os.environ, **environ}
        self._start: Callable[[], subprocess.Popen[bytes] | Fork]
        # What is read as an interpreter starts means nothing to a fork.
        if within or any(name.startswith(("PYTHON", "LD_")) for name in environ):
            self._start = partial(self._execute, [*within, sys.executable, "-m", "celery", *command], everything)
        else:
            self._start = partial(Fork, command, everything, self.log)
        self._process: subprocess.Popen[bytes] | Fork | None = None
        self._has_been_ready = False

    @property
    def pid(self) -> int:
        """Of the main process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> WorkerProcess:
        """Start it; it may not be ready yet."""
        self._process = self._start()
        return self

    def _execute(self, command: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def is_ready(self) -> bool:
        """Whether it has said that it consumes."""
        # A log grows long under load.
        self._has_been_ready = self._has_been_ready or " ready." in self.read_log()
        return self._has_been_ready

    def wait_ready(self) -> WorkerProcess:
        """Wait until it consumes."""
        wait_until(lambda: self.is_ready() or self.exit_code() is not None, START_S, f"{self.id} starts")
        assert self.exit_code() is None, self.read_log()
        return self

    def read_log(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the main process, as a crash; its pool's children end by themselves."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(STOP_S)

    def stop(self) -> int | None:
        """SIGTERM, and wait; whatever resists is killed. Safe to repeat."""
        if self._process is None or self._process.poll() is not None:
            return self.exit_code()
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for member in family:
                if member.is_running():
                    member.kill()
            self._process.wait(STOP_S)
        return self.exit_code()


@contextmanager
def running(*workers: WorkerProcess) -> Iterator[tuple[WorkerProcess, ...]]:
    """Start workers together, wait until all are ready, and stop them at the end."""
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            if worker.exit_code() is None:
                worker.signal(signal.SIGCONT)
                worker.signal(signal.SIGTERM)
        for worker in workers:
            worker.stop()
