"""Consul servers of a test's own, on the loopback: one alone or a cluster of three."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers import free_ports, missing
from tests.waiting import wait_until
from workers.redis_server import HOST
from workers.tether import tethered, tethering

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
PORT_ATTEMPTS = 5
PORTS = ("http", "server", "serf_lan")
ABSENT = -1


def consul_binary() -> str:
    """Return the path of ``consul``. Missing, it skips the test on a laptop and fails it in CI."""
    return shutil.which("consul") or missing(
        "no consul found: install Consul 1.8 or later, as .ci/run does it from Debian's bullseye"
    )


class ConsulServer:
    """One ``consul agent`` in server mode that dies with this process, however that ends.

    Data and ``consul.log`` are in ``directory``; the data outlive ``stop`` and ``kill``, and ports are kept.
    ``acl``: what has no token may do nothing; ``manager`` is the token that may do all. ``settings`` are more of
    its configuration; ``also_at`` are further addresses of this machine at which clients find it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        acl: bool = False,
        expect: int = 1,
        join: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
        also_at: Sequence[str] = (),
    ) -> None:
        self._directory, self._expect, self._join = directory, expect, join
        self.manager = str(uuid.uuid4()) if acl else ""
        self._settings = {"client_addr": " ".join({HOST, *also_at}), **(settings or {})}
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._parent_thread: ThreadPoolExecutor | None = None

    @property
    def port(self) -> int:
        """Of the HTTP API."""
        return self._ports["http"]

    @property
    def gossip_port(self) -> int:
        """By which other servers join this one."""
        return self._ports["serf_lan"]

    @property
    def server_port(self) -> int:
        """By which servers call each other: it tells which one leads."""
        return self._ports["server"]

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def url(self, token: str = "", datacenter: str = "", **options: str) -> str:
        """A registry URL for this server."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        credentials = f"{token}@" if token else ""
        return f"consul://{credentials}{HOST}:{self.port}/{datacenter}?{query}"

    def start(self, *, wait: bool = True) -> None:
        """Start, and return once there is a leader that this server can ask, unless ``wait`` is False."""
        binary = consul_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        had_ports = bool(self._ports)
        for attempt in range(PORT_ATTEMPTS):
            if not self._ports:
                self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            self._launch(binary)
            if not wait:
                return
            try:
                self.wait_for_leader()
                return
            except AssertionError as exc:
                self.kill()
                if had_ports or attempt == PORT_ATTEMPTS - 1 or "address already in use" not in str(exc):
                    raise
                self._ports = {}

    def stop(self) -> None:
        """End it in order, its data kept, and wait. Safe before a start and twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._forget()

    def kill(self) -> None:
        """End it at once, and wait. Safe before a start and twice."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self._forget()

    def wipe(self) -> None:
        """Lose the data of a server that does not run."""
        shutil.rmtree(self._directory / "data")

    def api(self, method: str, path: str, body: object = None, token: str | None = None) -> Any:
        """Call the HTTP API, as ``manager`` unless a ``token`` is given, and return what it answers.

        Raises OSError or HTTPException without an answer, AssertionError for a refusal.
        """
        connection = HTTPConnection(HOST, self.port, timeout=10)
        try:
            chosen = self.manager if token is None else token
            headers = {"X-Consul-Token": chosen} if chosen else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            text = reply.read().decode()
        finally:
            connection.close()
        assert reply.status == 200, f"{method} {path}: {reply.status} {text}"
        return json.loads(text) if text else None

    def leader(self) -> str:
        """The ``host:port`` of the leader as this server knows it; empty: it knows none."""
        try:
            return str(self.api("GET", "/v1/status/leader"))
        except (OSError, HTTPException, AssertionError):
            return ""

    def wait_for_leader(self) -> None:
        """Return once this server and a leader answer. Fails with the last lines of the log."""
        deadline, refusal = time.monotonic() + START_TIMEOUT_S, "it did not answer"
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, f"consul ended at once: {self._last_words()}"
            try:
                # A read through the leader; a key that is always there does not exist.
                self.api("GET", "/v1/kv/?keys&consistent")
                return
            except (OSError, HTTPException) as exc:
                refusal = repr(exc)
            except AssertionError as exc:
                refusal = str(exc)
                # Nothing is stored yet, and nothing else is wrong.
                if ": 404 " in refusal:
                    return
            time.sleep(0.05)
        raise AssertionError(f"consul has no leader after {START_TIMEOUT_S:g} s ({refusal}): {self._last_words()}")

    def requests(self) -> list[str]:
        """Method and path of each request that it has answered, from its log."""
        lines = self._log().splitlines()
        marked = [line.partition("Request finished: ")[2] for line in lines if "Request finished: " in line]
        return [line.partition(" from=")[0].replace("method=", "").replace("url=", "") for line in marked]

    def token(self, rules: str) -> str:
        """Make a token that may do what ``rules`` say."""
        name = f"p{uuid.uuid4().hex}"
        self.api("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})
        made = self.api("PUT", "/v1/acl/token", {"Policies": [{"Name": name}]})
        return str(made["SecretID"])

    def revoke(self, token: str) -> None:
        """End a token."""
        accessor = self.api("GET", "/v1/acl/token/self", token=token)["AccessorID"]
        self.api("DELETE", f"/v1/acl/token/{accessor}")

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
        # For the kernel the parent is the thread that forks: the test's may end long before its process.
        self._parent_thread = ThreadPoolExecutor(1, thread_name_prefix="parent-of-consul")
        with (self._directory / "consul.log").open("ab") as log:
            self._process = self._parent_thread.submit(
                subprocess.Popen,
                tethered(signal.SIGKILL, [binary, "agent", f"-config-file={self._write_configuration()}"]),
                cwd=self._directory,
                env=tethering(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).result()

    def _write_configuration(self) -> Path:
        configuration: dict[str, Any] = {
            "server": True,
            "bootstrap_expect": self._expect,
            "node_name": f"server-{self._ports['http']}",
            "data_dir": str(self._directory / "data"),
            "bind_addr": HOST,
            "advertise_addr": HOST,
            "ports": {**self._ports, "dns": ABSENT, "serf_wan": ABSENT, "grpc": ABSENT, "https": ABSENT},
            "retry_join": [f"{HOST}:{port}" for port in self._join],
            "retry_interval": "1s",
            "performance": {"raft_multiplier": 1},
            "gossip_lan": {"gossip_interval": "100ms", "probe_interval": "500ms", "probe_timeout": "250ms"},
            "disable_update_check": True,
            "leave_on_terminate": False,
            "skip_leave_on_interrupt": True,
            "log_level": "DEBUG",
        }
        if self.manager:
            configuration["acl"] = {
                "enabled": True,
                "default_policy": "deny",
                # What a revoked token may do must not be remembered.
                "token_ttl": "0s",
                "policy_ttl": "0s",
                "tokens": {"master": self.manager, "agent": self.manager},
            }
        ports = {**configuration["ports"], **self._settings.get("ports", {})}
        configuration.update(self._settings, ports=ports)
        path = self._directory / "consul.json"
        path.write_text(json.dumps(configuration), encoding="utf-8")
        return path

    def _log(self) -> str:
        return (self._directory / "consul.log").read_text(encoding="utf-8", errors="replace")

    def _last_words(self) -> str:
        return " / ".join(self._log().splitlines()[-5:])


class ConsulCluster:
    """Three servers, of which one may be lost."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.servers: list[ConsulServer] = []

    @property
    def leader(self) -> ConsulServer:
        """The server that leads. Waits until one does."""

        def leading() -> list[ConsulServer]:
            addresses = {server.leader() for server in self.servers} - {""}
            found = [server for server in self.servers if f"{HOST}:{server.server_port}" in addresses]
            return found if len(found) == 1 else []

        return wait_until(leading, START_TIMEOUT_S, "one of three leads")[0]

    def __enter__(self) -> Self:
        for number in range(3):
            join = [server.gossip_port for server in self.servers[:1]]
            server = ConsulServer(self._directory / f"server{number}", expect=3, join=join)
            self.servers.append(server)
            server.start(wait=False)
        try:
            for server in self.servers:
                server.wait_for_leader()
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.servers:
            server.kill()
