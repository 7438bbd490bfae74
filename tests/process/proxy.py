"""A wire between nodes and their Redis that a test can cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 65536


class Wire:
    """Forwards connections of the loopback to a port of the loopback; each may be cut with a reply on its way."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._cuts = 0
        self._frozen = False
        self.cut = 0
        """Replies that were cut off."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Of the Redis behind the wire."""
        return f"redis://127.0.0.1:{self.port}/0"

    def cut_replies(self, count: int = 1) -> None:
        """Let the next replies get lost: the command has been done, and the connection breaks instead of an answer."""
        with self._lock:
            self._cuts += count

    def freeze(self) -> None:
        """Let nothing pass any more, and keep the connections that stand, as a machine does that lost its power."""
        self._frozen = True

    def thaw(self) -> None:
        """Let new connections pass; those that were frozen stay silent."""
        with self._lock:
            frozen, self._pairs = self._pairs, set()
            self._frozen = False
            self._silent = frozen

    def close(self) -> None:
        """End all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = set(self._pairs) | getattr(self, "_silent", set())
        for pair in pairs:
            _end(*pair)

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

    def _forward(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, replies: bool
    ) -> None:
        silent = False
        with suppress(OSError):
            while data := source.recv(CHUNK):
                silent = silent or self._frozen
                if silent:
                    continue
                if replies and self._takes_a_cut():
                    break
                sink.sendall(data)
        if not silent:
            _end(*pair)
            with self._lock:
                self._pairs.discard(pair)

    def _takes_a_cut(self) -> bool:
        with self._lock:
            if not self._cuts:
                return False
            self._cuts -= 1
            self.cut += 1
            return True


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def wire_to(port: int) -> Iterator[Wire]:
    """A wire for as long as the block lasts."""
    wire = Wire(port)
    try:
        yield wire
    finally:
        wire.close()
