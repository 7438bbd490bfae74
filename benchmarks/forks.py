"""Celery's command line in processes that start at once: each is a fork of one that has imported all it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from workers.tether import end_with

END_S = 120.0


class ForkServer:
    """The process whose forks they are. They are its children: it alone learns how they end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In a session of its own: a Ctrl-C is for who asks it, and who has forks to end with its help.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, question: str, **order: Any) -> int | None:
        """Let it do one thing; return what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": question, **order}) + "\n")
            self._process.stdin.flush()
            answered: int | None = json.loads(self._process.stdout.readline())
        return answered

    def close(self) -> None:
        """End it, not its children."""
        self._process.communicate()


@cache
def fork_server() -> ForkServer:
    """The one of this process, started when it is first needed."""
    return ForkServer()


def close_fork_server() -> None:
    """End it, if there is one."""
    if fork_server.cache_info().currsize:
        fork_server().close()


class Fork:
    """One such process, used as ``subprocess.Popen`` is."""

    def __init__(self, words: list[str], environ: Mapping[str, str], log: Path) -> None:
        """Start ``celery`` with these words and nothing in its environment but ``environ``; it appends to ``log``."""
        self._log = log
        log.touch()
        self.returncode: int | None = None
        order = {"argv": words, "environ": dict(environ), "log": str(log), "directory": str(Path.cwd())}
        pid = fork_server().ask("fork", **order)
        assert pid is not None
        self.pid = pid

    def poll(self) -> int | None:
        """The exit code, negative if a signal ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = fork_server().ask("poll", pid=self.pid)
        return self.returncode

    def wait(self, timeout: float = END_S) -> int:
        """Wait until it has ended; return the exit code."""
        until_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until_s:
                raise subprocess.TimeoutExpired(str(self._log), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        # Its pid is not given to another before it is asked how it ended.
        if self.poll() is None:
            os.kill(self.pid, number)

    def read_log(self) -> str:
        """Everything it has logged."""
        return self._log.read_text(errors="replace")


class Forks:
    """The forks of one scenario. As a context it ends all that still run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[Fork] = []

    def celery(self, name: str, app: str, *words: str, **environ: str) -> Fork:
        """Start ``celery -A app words``; its log is named ``name``."""
        log = self._directory / f"{name}.log"
        self._all.append(Fork(["-A", app, *words], os.environ | environ, log))
        return self._all[-1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End all that run, and wait."""
        for fork in self._all:
            fork.send_signal(number)
        for fork in self._all:
            fork.wait()
        self._all.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL if kind else signal.SIGTERM)


def main() -> None:
    """Obey the orders on standard input, until it ends; a fork returns from here into Celery."""
    # Imported once, for all.
    import celery.__main__
    import celery.apps.worker
    import celery.backends.redis
    import celery.bin.celery
    import celery.concurrency.prefork
    import celery.concurrency.thread

    import workers.coordinator  # noqa: F401

    me = os.getpid()
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "poll":
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            answer(os.waitstatus_to_exitcode(status) if pid else None)
        elif pid := os.fork():
            answer(pid)
        else:
            end_with(me, signal.SIGKILL)
            become(order)
            sys.argv = [celery.__main__.__file__, *order["argv"]]
            return celery.__main__.main()
    return None


def answer(number: int | None) -> None:
    sys.stdout.write(json.dumps(number) + "\n")
    sys.stdout.flush()


def become(order: dict[str, Any]) -> None:
    """Take on the environment, the directory and the files of a new process."""
    os.environ.clear()
    os.environ.update(order["environ"])
    os.chdir(order["directory"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    main()
