"""etcd servers of one's own on the loopback: single ones, and clusters of three."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import requests

from tests.servers import free_ports, missing
from tests.waiting import wait_until
from workers.redis_server import HOST, free_port
from workers.tether import tethered, tethering

PORT_ATTEMPTS = 5
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 5.0
ROOT, ROOT_PASSWORD = "root", "root of the test"
KEPT = "ttl=10m"
"""What a URL ends with where no node beats, and none is to leave: a machine may be slow."""


class EtcdServer:
    """One ``etcd`` process that dies with this process. Over restarts it keeps its ports, and its data unless wiped.

    ``peers`` are the peer ports of all members by name, its own among them, when it is one of several. With
    ``identity``, the files of a certificate and its key, it speaks TLS and takes only clients of the same certificate.
    ``options`` are more of its flags; ``also_at`` are further addresses of this machine at which clients find it.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "single",
        peers: Mapping[str, int] | None = None,
        identity: tuple[Path, Path] | None = None,
        options: Mapping[str, object] | None = None,
        also_at: Sequence[str] = (),
    ) -> None:
        self.directory, self.name = directory, name
        self.port = free_port()
        self._identity, self._options, self._hosts = identity, options or {}, sorted({HOST, *also_at})
        self._peers = peers or {name: free_port()}
        self._process: subprocess.Popen[bytes] | None = None
        self._parent_thread: ThreadPoolExecutor | None = None
        self._token = ""

    @property
    def address(self) -> str:
        """Host and port for clients."""
        return f"{HOST}:{self.port}"

    @property
    def _base_url(self) -> str:
        return f"{'https' if self._identity else 'http'}://{self.address}"

    @property
    def _tls(self) -> dict[str, Any]:
        return {"verify": self._identity[0], "cert": self._identity} if self._identity else {}

    @property
    def url(self) -> str:
        """Of a registry in it."""
        return f"etcd://{self.address}/test"

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def healthy(self) -> bool:
        """Whether it answers and, as a member, sees a leader."""
        try:
            answer = requests.get(f"{self._base_url}/health", timeout=1, **self._tls)
        except requests.RequestException:
            return False
        return bool(answer.ok and answer.json().get("health") == "true")

    def launch(self) -> None:
        """Start, and return at once; a server that runs already is left alone."""
        if self.running:
            return
        binary = shutil.which("etcd") or missing("no etcd found: install one (Debian: apt install etcd-server)")
        self.directory.mkdir(parents=True, exist_ok=True)
        peer = f"http://{HOST}:{self._peers[self.name]}"
        members = ",".join(f"{name}=http://{HOST}:{port}" for name, port in self._peers.items())
        options: dict[str, object] = {
            "name": self.name,
            "data-dir": self.directory / "data",
            "listen-client-urls": ",".join(self._base_url.replace(HOST, host) for host in self._hosts),
            "advertise-client-urls": self._base_url,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": members,
            "logger": "zap",
            "log-outputs": self.directory / "etcd.log",
            **self._options,
        }
        if self._identity:
            certificate, key = self._identity
            options |= {"cert-file": certificate, "key-file": key, "trusted-ca-file": certificate}
            options["client-cert-auth"] = "true"
        command = [binary, *(f"--{option}={value}" for option, value in options.items())]
        environment = {name: value for name, value in tethering().items() if not name.startswith("ETCD_")}
        # For the kernel the parent is the thread that forks: the caller's may end long before its process.
        self._parent_thread = ThreadPoolExecutor(1, thread_name_prefix="parent-of-etcd")
        self._process = self._parent_thread.submit(
            subprocess.Popen,
            tethered(signal.SIGTERM, command),
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ).result()

    def start(self) -> None:
        """Start, and return once it is healthy. Before its first start a single server may change its ports."""
        for _ in range(PORT_ATTEMPTS):
            is_new = len(self._peers) == 1 and not (self.directory / "data").exists()
            self.launch()
            wait_until(lambda: self.healthy or not self.running, START_TIMEOUT_S, f"etcd {self.name} is healthy")
            if self.running or not is_new or "address already in use" not in self._log():
                break
            # Another process was quicker to take one.
            self.stop()
            self.wipe()
            self.port, self._peers = free_port(), {self.name: free_port()}
        assert self.running, f"etcd ended at once: {self._log()[-2000:]}"

    def stop(self) -> None:
        """End it in order, and wait. Safe before a start and twice."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash would, and wait. Safe before a start and twice."""
        self._end(signal.SIGKILL)

    def wipe(self) -> None:
        """Forget all data of a server that does not run."""
        assert not self.running
        shutil.rmtree(self.directory / "data", ignore_errors=True)

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let it hang for as long as the block lasts: it holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def ask(self, path: str, **body: Any) -> Mapping[str, Any]:
        """Return what the gateway answers to a request of the superuser."""
        headers = {"Authorization": self._token} if self._token else {}
        url = f"{self._base_url}/v3/{path}"
        answer = requests.post(url, json=body, headers=headers, timeout=ANSWER_TIMEOUT_S, **self._tls)
        assert answer.ok, f"{path}: {answer.text}"
        found: Mapping[str, Any] = answer.json()
        return found

    @property
    def is_leader(self) -> bool:
        """Whether it leads its cluster."""
        status = self.ask("maintenance/status")
        return bool(status.get("leader") == status["header"]["member_id"])

    @property
    def revision(self) -> int:
        """Of its store."""
        return int(self.ask("maintenance/status")["header"]["revision"])

    def metric(self, name: str, label: str = "") -> int:
        """The sum of the values of a counter whose labels contain ``label``."""
        text = requests.get(f"{self._base_url}/metrics", timeout=ANSWER_TIMEOUT_S, **self._tls).text
        lines = re.findall(rf"^{name}({{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(int(float(value)) for labels, value in lines if label in labels)

    def compact(self) -> None:
        """Forget the history up to now."""
        self.ask("kv/compaction", revision=self.revision, physical=True)

    def empty(self) -> None:
        """Delete all keys."""
        first = b64encode(b"\0").decode()
        self.ask("kv/deleterange", key=first, range_end=first)

    def demand_users(self) -> None:
        """Ask every client for a user from now on; there is the superuser."""
        self.ask("auth/user/add", name=ROOT, password=ROOT_PASSWORD)
        self.ask("auth/user/grant", user=ROOT, role="root")
        self.ask("auth/enable")
        self.log_in()

    def log_in(self) -> None:
        """Ask as the superuser from now on; a restart ends that."""
        self._token = ""
        self._token = self.ask("auth/authenticate", name=ROOT, password=ROOT_PASSWORD)["token"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _log(self) -> str:
        log = self.directory / "etcd.log"
        return log.read_text() if log.exists() else "it wrote no log"

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            # It may stand still.
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._parent_thread is not None:
            self._parent_thread.shutdown()
            self._parent_thread = None


@contextmanager
def etcd_cluster(directory: Path, size: int = 3) -> Iterator[list[EtcdServer]]:
    """Run several servers that are one etcd."""
    peers = {f"m{number}": port for number, port in enumerate(free_ports(size))}
    servers = [EtcdServer(directory / name, name, peers) for name in peers]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.launch()
        for server in servers:
            server.start()
        yield servers
