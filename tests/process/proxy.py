"""A wire between nodes and their Redis that a test can cut, slow down and hold up."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto

CHUNK = 65536
LATE_S = 1.5
"""How long after a connection has fallen silent it is closed slowly."""
Pair = tuple[socket.socket, socket.socket]


class Cut(Enum):
    """How a connection breaks off where a reply should come."""

    CLOSED = auto()
    """It is closed before the reply."""
    RESET = auto()
    """It is reset in the middle of the reply."""
    LATE = auto()
    """It falls silent, and is closed a while later."""


class Wire:
    """Forwards connections of the loopback to a port of the loopback; each may be cut with a reply on its way."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[Pair] = set()
        self._silent: set[Pair] = set()
        """Nothing passes any more, whatever is sent."""
        self._cuts: deque[Cut] = deque()
        self._spared = 0
        self._frozen = self._holds_requests = self._holds_replies = False
        self.latency_s = 0.0
        """Added to each way."""
        self.cut = 0
        """Replies that were cut off."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Of the Redis behind the wire."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def addresses(self) -> list[str]:
        """From where, as Redis sees it, the connections that stand come."""
        found = []
        with self._lock:
            for _, server in self._pairs:
                with suppress(OSError):  # It has just ended.
                    found.append("{}:{}".format(*server.getsockname()))
        return found

    def cut_replies(self, count: int = 1, how: Cut = Cut.CLOSED, after: int = 0) -> None:
        """Let replies get lost: the command has been done, and the connection breaks instead of an answer.

        Those that come next, or come when ``after`` others have passed.
        """
        with self._lock:
            self._cuts.extend([how] * count)
            self._spared = after

    def freeze(self) -> None:
        """Let nothing pass any more, and keep the connections that stand, as a machine does that lost its power."""
        self._frozen = True

    def thaw(self) -> None:
        """Let new connections pass; those that were frozen stay silent."""
        with self._lock:
            self._silent |= self._pairs
            self._pairs.clear()
            self._frozen = False

    def hold(self, *, requests: bool, replies: bool) -> None:
        """Let nothing pass in these directions; what was sent arrives when it may again."""
        self._holds_requests, self._holds_replies = requests, replies

    def close(self) -> None:
        """End all connections."""
        self.hold(requests=False, replies=False)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = self._pairs | self._silent
        for pair in pairs:
            self._end(pair)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            pair = client, server
            with self._lock:
                self._pairs.add(pair)
            for source, sink, replies in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(pair, source, sink, replies), daemon=True).start()

    def _forward(self, pair: Pair, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                self._wait(replies)
                if self._frozen:
                    with self._lock:
                        self._silent.add(pair)
                if pair in self._silent:
                    continue
                if replies and (cut := self._next_cut()):
                    self._break(pair, cut, data)
                    return
                sink.sendall(data)
        if pair not in self._silent:
            self._end(pair)

    def _wait(self, replies: bool) -> None:
        if self.latency_s:
            time.sleep(self.latency_s)
        while self._holds_replies if replies else self._holds_requests:
            time.sleep(0.01)

    def _next_cut(self) -> Cut | None:
        with self._lock:
            if not self._cuts:
                return None
            if self._spared:
                self._spared -= 1
                return None
            self.cut += 1
            return self._cuts.popleft()

    def _break(self, pair: Pair, cut: Cut, reply: bytes) -> None:
        client, _ = pair
        if cut is Cut.LATE:
            with self._lock:
                self._silent.add(pair)
            time.sleep(LATE_S)
        elif cut is Cut.RESET:
            client.sendall(reply[: len(reply) // 2])
            # Closed with no time to linger, a connection is reset; nothing else may end it before.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with self._lock:
                self._silent.add(pair)
            client.shutdown(socket.SHUT_RD)
            client.close()
        self._end(pair)

    def _end(self, pair: Pair) -> None:
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._pairs.discard(pair)
            self._silent.discard(pair)


@contextmanager
def wire_to(port: int) -> Iterator[Wire]:
    """A wire for as long as the block lasts."""
    wire = Wire(port)
    try:
        yield wire
    finally:
        wire.close()
