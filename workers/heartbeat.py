"""A heartbeat out of the reach of the GIL: a small process that beats while its parent lives and is not stopped.

A regular expression or an extension that never lets go of the GIL stops every thread of its process. In pools that run
tasks in the worker's own process, threads and solo, a heartbeat thread would stop with them, and a node at work would
be taken for dead.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster_tasks.broker.epochs import EpochTable, Standing
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from cluster_tasks.settings import ClusterSettings

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
REVIVE_EVERY_S = 5.0
"""Where each dies at once, as for lack of memory, to start them must not be what the node does all the time."""


class HeartbeatProcess:
    """The parent's side. It ends with its parent, however that ends."""

    def __init__(self, settings: ClusterSettings, node_id: str) -> None:
        self._orders = {
            "broker_url": settings.broker_url.get_secret_value(),
            "sentinel_master": settings.sentinel_master,
            "cluster": settings.name,
            "heartbeat_s": settings.heartbeat_s,
            "node_id": node_id,
        }
        self._process: subprocess.Popen[str] | None = None
        self._launched_s = float("-inf")

    def start(self) -> None:
        """Make it ready to beat, and wait until it is: a job may hold the GIL from the moment the node has joined.

        Raises OSError if the system has no room for it.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._launch()
            assert self._process.stdout is not None
            self._process.stdout.readline()

    def beat_for(self, epoch: str) -> None:
        """Beat for this epoch from now on. Waits for nothing: a node that joins anew has not beaten yet."""
        try:
            if self._process is None or self._process.poll() is not None:
                self._process = self._launch()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**self._orders, "epoch": epoch}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            # It has died just now, or there is no room for another: ``revive`` comes to that.
            logger.warning("nothing beats beside this node for now: %s", exc)

    def revive(self, epoch: str) -> None:
        """Start another, which beats for this epoch, if the one that was started has died. Safe to repeat."""
        if self._process is None or self._process.poll() is None:
            return
        if time.monotonic() - self._launched_s >= REVIVE_EVERY_S:
            logger.warning("what beats beside this node has died (%d), another is started", self._process.returncode)
            self.beat_for(epoch)

    def stop(self) -> None:
        """Beat no more. Safe to repeat, and before ``beat_for``."""
        if self._process is None:
            return
        _close_pipes(self._process)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _launch(self) -> subprocess.Popen[str]:
        self._launched_s = time.monotonic()
        if self._process is not None:
            _close_pipes(self._process)
        # By the path of this process: else a package of the same name in the current folder came first.
        command = [sys.executable, "-P", "-m", __name__]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        # The URL goes by a pipe: a command line is for everybody to read.
        return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        # What was written to one that has died is lost.
        with suppress(OSError):
            pipe.close()


def is_stopped(pid: int) -> bool:
    """Whether a process stands still under SIGSTOP or a debugger: then it must not seem alive."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("T", "t", "Z", "X")


def main() -> None:
    """Beat for the epoch of the last line on standard input, until it is closed."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    parent, orders = os.getppid(), _read_orders()
    while orders is not None:
        client = connect(orders["broker_url"], sentinel_master=orders["sentinel_master"])
        epochs = EpochTable(client, Keys(orders["cluster"]))
        while not _arrived(orders["heartbeat_s"]):
            if is_stopped(parent) or os.getppid() != parent:
                continue
            try:
                pulse = epochs.beat(orders["node_id"], orders["epoch"])
            except BrokerUnavailable:
                # The agent in the parent notices the same and says so.
                continue
            if pulse.standing is Standing.FENCED:
                break
        client.close()
        orders = _read_orders()


def _arrived(wait_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def _read_orders() -> dict[str, Any] | None:
    line = sys.stdin.readline()
    return json.loads(line) if line else None


if __name__ == "__main__":
    main()
