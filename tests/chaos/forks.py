"""Celery's command line in processes that start at once: each is a fork of one that has imported all it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.waiting import wait_until

END_S = 60.0


class Fork:
    """One such process."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    def is_alive(self) -> bool:
        """Whether it runs."""
        return psutil.pid_exists(self.pid)

    def read_log(self) -> str:
        """Everything it has logged."""
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.is_alive():
            os.kill(self.pid, number)

    def wait_gone(self) -> None:
        """Wait until it has ended."""
        wait_until(lambda: not self.is_alive(), END_S, f"{self._log.stem} ends")


class Forks:
    """Makes them. As a context it ends all that still run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[Fork] = []

    def celery(self, name: str, app: str, *words: str, **environ: str) -> Fork:
        """Start ``celery -A app words``; its log is named ``name``."""
        log = self._directory / f"{name}.log"
        log.touch()
        order = {"argv": ["celery", "-A", app, *words], "environ": environ, "log": str(log)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self._all.append(Fork(int(self._server.stdout.readline()), log))
        return self._all[-1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End all that run, and wait."""
        for fork in self._all:
            fork.signal(number)
        for fork in self._all:
            fork.wait_gone()
        self._all.clear()

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL if kind else signal.SIGTERM)
        self._server.communicate()


def main() -> None:
    """Fork for each order on standard input, and say the pid."""
    from celery.__main__ import main as celery

    import workers.coordinator  # noqa: F401 - imported once, for all.

    # The kernel buries those that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(order["environ"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = order["argv"]
        celery()


if __name__ == "__main__":
    main()
