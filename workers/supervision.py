"""Programs of one machine, kept running by supervisord, which ends with this process and they with it."""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xmlrpc.client import Fault, ProtocolError, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from cluster_tasks.errors import ClusterError
from workers.tether import tethered, tethering

NUMBER = "%(process_num)d"
"""In the words of a program: which of its copies runs them, from 1."""
RUNNING = "RUNNING"
STOPPING = "STOPPING"
ENDED = ("STOPPED", "EXITED", "FATAL")
"""What supervisord calls programs that do not run and that it does not start by itself."""
STEADY_S = 2
"""A program that ends sooner is restarted ever more slowly, a second longer each time."""
SOCKET_PATH_MAX = 90
"""Bytes. The kernel takes 107, of which supervisord needs some for a temporary name."""


@dataclass(frozen=True, slots=True)
class Program:
    """Something to run, ``copies`` times, with its output in ``logs/<name>.log``."""

    name: str
    """With NUMBER in it if there may be copies; all copies are stopped at once."""
    command: Sequence[str]
    priority: int
    """Low ones are started first and stopped last."""
    copies: int = 1
    first: int = 1
    """Number of the first copy."""
    group: str = ""
    """What supervisord calls all copies; empty: their name without the number."""
    started: bool = True
    """Whether it runs from the start, or when it is told to."""
    restart: bool = True
    stop_timeout_s: float = 10.0
    """What still runs so long after SIGTERM is killed."""


class Supervisor:
    """One supervisord with its programs.

    Files go to ``directory``: ``logs``, a control socket, and ``supervisord.conf``, which ``supervisorctl -c`` takes.
    """

    def __init__(self, directory: Path, programs: Sequence[Program]) -> None:
        self._directory, self._programs = directory.absolute(), programs
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether supervisord exists."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start supervisord, which starts the programs; one that runs already is left alone."""
        if self.running:
            return
        logs = self._directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        path = self._directory / "supervisord.conf"
        path.write_text(self._configuration(), encoding="utf-8")
        # Its own session keeps a Ctrl-C of the terminal away, so that all ends in order.
        with (logs / "supervisord.out").open("ab") as output:
            self._process = subprocess.Popen(
                tethered(signal.SIGKILL, [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(path)]),
                env=tethering(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End all programs in order, and wait. Safe before a start and twice; when interrupted it ends them at once."""
        if self._process is None:
            return
        try:
            self._process.terminate()
            self._process.wait(sum(program.stop_timeout_s for program in self._programs) + 10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """End all at once, and wait. Safe before a start and twice."""
        if self._process is None:
            return
        programs = self._children() if self.running else []
        processes = [*programs, *(child for program in programs for child in program.children(recursive=True))]
        self._process.kill()
        self._process.wait()
        # They are tethered to it and die now.
        psutil.wait_procs(processes, timeout=10)
        self._process = None

    def pids(self) -> dict[str, int]:
        """Return the process ids of the programs that run, by name."""
        found = {}
        for process in self._children():
            try:
                found[process.environ()["SUPERVISOR_PROCESS_NAME"]] = process.pid
            except (psutil.Error, KeyError):  # It ends or only begins.
                continue
        return found

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _children(self) -> list[psutil.Process]:
        assert self._process is not None
        try:
            return psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def _configuration(self) -> str:
        # Paths begin at %(here)s: any character of a folder's name would do, where the file gives some a meaning.
        sections = [
            {
                "": "supervisord",
                "nodaemon": "true",
                "silent": "true",
                "logfile": "%(here)s/logs/supervisord.log",
                "pidfile": "%(here)s/supervisord.pid",
                **({"user": pwd.getpwuid(0).pw_name} if os.getuid() == 0 else {}),
            },
            *map(_section, self._programs),
        ]
        if len(os.fsencode(self._directory / "supervisor.sock")) <= SOCKET_PATH_MAX:
            control = "supervisor.rpcinterface:make_main_rpcinterface"
            sections += [
                {"": "unix_http_server", "file": "%(here)s/supervisor.sock", "chmod": "0700"},
                {"": "supervisorctl", "serverurl": "unix://%(here)s/supervisor.sock"},
                {"": "rpcinterface:supervisor", "supervisor.rpcinterface_factory": control},
            ]
        return "\n".join(_lines(section) for section in sections)


class SupervisorClient:
    """Speaks to the supervisord of a directory, whoever started it. Raises ClusterError if none answers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / "supervisor.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ClusterError(f"supervisord has no control socket where the path is so long: {path}")
        # The address of the server is not used: what it says goes through the socket.
        self._transport = SupervisorTransport(serverurl=f"unix://{path}")
        self._server: Any = ServerProxy("http://localhost", self._transport)
        self._full_names: dict[str, str] = {}

    def states(self) -> dict[str, str]:
        """Return how the programs stand, by name, in supervisord's words, such as RUNNING."""
        found = self._call(lambda: self._server.supervisor.getAllProcessInfo())
        self._full_names = {each["name"]: f"{each['group']}:{each['name']}" for each in found}
        return {each["name"]: str(each["statename"]) for each in found}

    def group(self, name: str) -> str:
        """Return the group of a program that ``states`` has told of."""
        return self._full_names[name].partition(":")[0]

    def stop(self, name: str) -> None:
        """Tell a program to end; does not wait."""
        self._call(lambda: self._server.supervisor.stopProcess(self._full_names[name], False))

    def start(self, name: str) -> None:
        """Start a program that has ended; does not wait."""
        self._call(lambda: self._server.supervisor.startProcess(self._full_names[name], False))

    def _call(self, method: Callable[[], Any]) -> Any:
        try:
            return method()
        except Fault as exc:
            raise ClusterError(f"supervisord refused: {exc.faultString}") from exc
        except (OSError, HTTPException, ProtocolError) as exc:
            where = f"{self._directory} (--data-dir names another)"
            raise ClusterError(f"no cluster-tasks up answers in {where}: {exc}") from exc
        finally:
            self._transport.close()


@contextmanager
def turn_to_change(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Be the only one, for as long as the block lasts, that starts and stops programs of a directory by itself.

    Yields whether that is so: if another is at it, and ``wait`` is not set, it is not.
    """
    with (directory / "change.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _section(program: Program) -> dict[str, str]:
    command = shlex.join(tethered(signal.SIGKILL, program.command)).replace("%", "%%")
    return {
        "": f"program:{program.group or program.name.replace(NUMBER, '')}",
        "command": command.replace("%" + NUMBER, NUMBER),
        "process_name": program.name,
        "numprocs": str(program.copies),
        "numprocs_start": str(program.first),
        "autostart": str(program.started).lower(),
        "priority": str(program.priority),
        "autorestart": str(program.restart).lower(),
        "startsecs": str(STEADY_S),
        "startretries": "1000000",
        "stopsignal": "TERM",
        "stopwaitsecs": str(round(program.stop_timeout_s)),
        # A node's pool is stopped by the node, whose jobs it runs; only what is killed goes with all it has started.
        "stopasgroup": "false",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"%(here)s/logs/{program.name}.log",
        "stdout_logfile_maxbytes": "10MB",
        "stdout_logfile_backups": "1",
    }


def _lines(section: dict[str, str]) -> str:
    name, *items = section.items()
    return "\n".join([f"[{name[1]}]", *(f"{key}={value}" for key, value in items), ""])
