"""What benchmarks run on: a Redis of their own, and workers that end with the benchmark, however that ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import psutil

from cluster_tasks.errors import ConfigurationError
from workers.redis_server import HOST, RedisServer, free_port
from workers.tether import tethered, tethering

HOME = Path(__file__).parents[1]
START_S, STOP_S = 60.0, 15.0
LAST_WORDS = 2_000
"""Characters of a log that an error shows."""


def alone() -> None:
    """Let nothing of the caller's cluster be in the figures, nor the benchmark in his; end in order when told to."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for variable in [name for name in os.environ if name.startswith(("CLUSTER_", "CELERY_"))]:
        del os.environ[variable]


@contextmanager
def private_redis(extra: Sequence[str] = ()) -> Iterator[RedisServer]:
    """Run a Redis with a folder of its own, ``server.directory``, in which logs and data of a run may lie as well."""
    with TemporaryDirectory(prefix="benchmark-") as name, RedisServer(Path(name), extra=extra) as server:
        yield server


@contextmanager
def private_consul() -> Iterator[str]:
    """Run a Consul that keeps all in memory; yield its ``consul://`` URL. Raises ConfigurationError without one."""
    binary = shutil.which("consul")
    if binary is None:
        raise ConfigurationError("no consul found: install Consul 1.8 or later (Debian: apt install consul)")
    ports = {"http": free_port(), "server": free_port(), "serf_lan": free_port()}
    absent = dict.fromkeys(("dns", "serf_wan", "grpc", "https"), -1)
    settings = {"bind_addr": HOST, "client_addr": HOST, "ports": {**ports, **absent}, "disable_update_check": True}
    with TemporaryDirectory(prefix="benchmark-") as name:
        file = Path(name) / "consul.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        with Worker([binary, "agent", "-dev", f"-config-file={file}"], Path(name) / "consul.log") as agent:
            # "" while it has no leader.
            wait_until(lambda: len(_answer(f"http://{HOST}:{ports['http']}/v1/status/leader")) > 2, START_S, [agent])
            yield f"consul://{HOST}:{ports['http']}"


def _answer(url: str) -> bytes:
    try:
        with urlopen(url, timeout=5) as reply:
            return bytes(reply.read())
    except OSError:
        return b""


class Worker:
    """A command in a session of its own; it is told to end when this process dies, and when the block ends."""

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self._command, self._environ, self.log = list(command), dict(environ or {}), log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the command itself. Raises RuntimeError before the start."""
        if self._process is None:
            raise RuntimeError(f"{self._command[0]} was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it with the environment of this process and what was given; it writes to ``log`` alone."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # Killed, it would leave its own processes behind.
                tethered(signal.SIGTERM, self._command),
                cwd=HOME,
                env=tethering() | self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End it in order; what is left of its session after a while is killed. Safe before a start, twice."""
        if self._process is None:
            return
        family = self.family()
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        psutil.wait_procs(family[1:], timeout=STOP_S)
        # Of one that has ended by itself, nobody knows who its children were.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it at once, as a crash would, and wait. Its children are left to themselves."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def family(self) -> list[psutil.Process]:
        """Return its process and all below it; none if it has ended."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:] if self.log.exists() else ""

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def celery_worker(
    app: str,
    node: str,
    pool: str,
    slots: int,
    log: Path,
    environ: Mapping[str, str] | None = None,
    extra: Sequence[str] = (),
) -> Worker:
    """Return a worker of Celery's own command line; ``app`` is a module, ``extra`` are more of its words."""
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", node, "-l", "WARNING"]
    return Worker([*command, "-P", pool, "-c", str(slots), *extra], log, environ)


def wait_until(
    condition: Callable[[], object], within_s: float, workers: Sequence[Worker] = (), every_s: float = 0.05
) -> None:
    """Wait for the condition. Raises TimeoutError with the ends of the logs, RuntimeError if a worker has ended."""
    until_s = time.monotonic() + within_s
    while not condition():
        for worker in workers:
            worker.check()
        if time.monotonic() > until_s:
            raise TimeoutError(f"not within {within_s:g} s\n" + "\n".join(worker.last_words() for worker in workers))
        time.sleep(every_s)
