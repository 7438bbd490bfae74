"""What happened to jobs and epochs, in the one order in which Redis did it, told by its MONITOR and not by our code."""

from __future__ import annotations

import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import redis

from cluster_tasks.keys import DEFAULT_NAME, Keys
from tests.waiting import wait_until

CLIENT_NAME = "history"
"""Of its connection: who kills connections at random spares that."""
CATCH_UP_S = 30.0


@dataclass(frozen=True, slots=True)
class Commit:
    """The end of a job was stored."""

    order: int
    at: float
    """Seconds since 1970 by Redis' clock."""
    job_id: str
    tag: str
    """Of the delivery that ended it; ``revoked`` if no node held it."""

    @property
    def epoch(self) -> str:
        """The epoch whose delivery it was."""
        return self.tag.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Fence:
    """An epoch was ended."""

    order: int
    at: float
    node_id: str
    epoch: str
    ending: str
    """``lost`` or ``closed``."""


class History:
    """Follows one Redis on a thread of its own. A connection that breaks is made anew; ``holes`` counts how often."""

    def __init__(self, url: str, name: str = DEFAULT_NAME) -> None:
        parts, keys = urlsplit(url), Keys(name)
        self._address = parts.hostname or "127.0.0.1", parts.port or 6379
        self.commits: list[Commit] = []
        self.committed: set[str] = set()
        """Ids of the jobs that have come to an end."""
        self.fences: dict[str, Fence] = {}
        """By epoch."""
        self.moved: dict[str, float] = {}
        """Epoch → when nothing was left of what it had held and listed; all of it waited for living nodes then."""
        self.holes = -1
        self._seen: set[bytes] = set()
        self._stopping = threading.Event()
        fenced = re.escape(keys.fenced)
        pattern = (
            rf'^\+(\d+\.\d+) \[[^\]]*\] "(?:SET" "{re.escape(keys.terminal(""))}([^"]+)" "([^"]*)"'
            rf'|HSET" "{fenced}" "([^"]+)/([^"/]+)" "(\w+)[^"]*"|HDEL" "{fenced}" "[^"]+/([^"/]+)"'
            r'|ECHO" "history:(\w+)")'
        )
        self._pattern = re.compile(pattern.encode())
        words = (f'"SET" "{keys.terminal("")}', f'SET" "{keys.fenced}"', f'"HDEL" "{keys.fenced}"', '"ECHO" "history:')
        self._words = tuple(word.encode() for word in words)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Follow, from now on."""
        self._thread.start()
        wait_until(lambda: self.holes >= 0, CATCH_UP_S, "Redis lets itself be followed")

    def stop(self) -> None:
        """Follow no more."""
        self._stopping.set()
        self._thread.join()

    def catch_up(self, client: redis.Redis) -> None:
        """Wait until all is told that was done before this call."""

        def is_told() -> bool:
            mark = uuid.uuid4().hex.encode()
            client.echo(b"history:" + mark)
            until_s = time.monotonic() + 1.0
            while mark not in self._seen and time.monotonic() < until_s:
                time.sleep(0.005)
            return mark in self._seen

        wait_until(is_told, CATCH_UP_S, "the history is told to its end")

    def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(OSError), socket.create_connection(self._address, timeout=1.0) as wire:
                wire.sendall(f"CLIENT SETNAME {CLIENT_NAME}\r\nMONITOR\r\n".encode())
                wire.settimeout(0.2)
                self._follow(wire)
            self._stopping.wait(0.02)

    def _follow(self, wire: socket.socket) -> None:
        rest, is_followed = b"", False
        while not self._stopping.is_set():
            try:
                data = wire.recv(1 << 20)
            except TimeoutError:
                continue
            if not data:
                return
            if not is_followed:
                is_followed = True
                self.holes += 1
            *lines, rest = (rest + data).split(b"\r\n")
            for line in lines:
                if any(word in line for word in self._words):
                    self._take(line)

    def _take(self, line: bytes) -> None:
        found = self._pattern.match(line)
        if found is None:
            return
        stamp, job_id, tag, node_id, epoch, ending, moved, mark = found.groups()
        at, order = float(stamp), len(self.commits) + len(self.fences)
        if mark:
            self._seen.add(mark)
        elif job_id:
            self.commits.append(Commit(order, at, job_id.decode(), tag.decode()))
            self.committed.add(job_id.decode())
        elif epoch:
            fence = Fence(order, at, node_id.decode(), epoch.decode(), ending.decode())
            self.fences.setdefault(fence.epoch, fence)
        else:
            self.moved.setdefault(moved.decode(), at)


@contextmanager
def followed(url: str, name: str = DEFAULT_NAME) -> Iterator[History]:
    """The history of a Redis for as long as the block lasts."""
    history = History(url, name)
    history.start()
    try:
        yield history
    finally:
        history.stop()
