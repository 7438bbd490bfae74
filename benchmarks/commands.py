"""What a Redis was asked, as its MONITOR tells it: by whom counted, in what kinds, and said again for other nodes."""

from __future__ import annotations

import re
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster_tasks.redis_store import connect

LINE = re.compile(rb'^\+?(?P<at>\d+\.\d+) \[\d+ (?P<who>[^\]]+)\] (?P<words>".*)$', re.DOTALL)
"""A line of MONITOR that tells of a command, with or without the sign of the protocol."""
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(rb"\\(x[0-9a-f]{2}|.)", re.DOTALL)
_PLAIN = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}
BY_SCRIPT = b"lua"
PATIENCE_S = 60.0
READ_AT_ONCE = 1 << 16


def words_of(line: bytes) -> list[bytes] | None:
    """The words of a command in a line of MONITOR; None if it is none, or one that a script gave."""
    found = LINE.match(line)
    return None if found is None or found["who"] == BY_SCRIPT else unquoted(found["words"])


def unquoted(words: bytes) -> list[bytes]:
    """The words of a command as they were said."""
    return [_ESCAPED.sub(_unescaped, word) for word in _WORD.findall(words)]


def _unescaped(found: re.Match[bytes]) -> bytes:
    code = found[1]
    return bytes([int(code[1:], 16)]) if len(code) == 3 else _PLAIN.get(code, code)


@contextmanager
def followed(url: str) -> Iterator[list[list[bytes]]]:
    """Follow what a Redis without a password is told while the block lasts; the list is filled at its end."""
    parts, mark, commands = urlsplit(url), uuid.uuid4().hex.encode(), list[list[bytes]]()
    address = parts.hostname or "127.0.0.1", parts.port or 6379
    with socket.create_connection(address, timeout=PATIENCE_S) as wire, ThreadPoolExecutor(1) as reader:
        wire.sendall(b"MONITOR\r\n")
        begin = wire.recv(len(b"+OK\r\n"))
        reading = reader.submit(_read_until, wire, mark, begin)
        try:
            yield commands
        finally:
            with connect(url, socket_timeout=PATIENCE_S) as client:
                client.echo(mark)
            lines = reading.result().split(b"\r\n")
        commands += [words for line in lines if mark not in line and (words := words_of(line))]


def _read_until(wire: socket.socket, mark: bytes, begin: bytes) -> bytes:
    data = bytearray(begin)
    while mark not in data[-READ_AT_ONCE - len(mark) :]:
        more = wire.recv(READ_AT_ONCE)
        if not more:
            raise ConnectionError("Redis lets itself be followed no more: its buffer for that was full, or it ended")
        data += more
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a command tells of the node that gives it."""

    node: str
    epoch: str


class Kinds:
    """Sorts commands: those of one kind differ in nothing but the node that gives them, and in values."""

    def __init__(self, nodes: Iterable[Identity], scripts: dict[str, str]) -> None:
        """``scripts`` are the names of scripts by their SHA1. Of nodes of one name the last is meant."""
        self._nodes = list(nodes)
        self._scripts = {sha.encode(): name for sha, name in scripts.items()}
        names = sorted((each.node for each in self._nodes), key=len, reverse=True)
        # Longer ones first: n1 is the beginning of n10.
        self._any_node = re.compile(b"|".join(re.escape(name.encode()) for name in names) or b"(?!)")
        self._by_node = {each.node.encode(): each for each in self._nodes}

    def kind(self, words: Sequence[bytes]) -> str:
        """The name of its kind: the script or command, and the first key without the node."""
        command = words[0].upper().decode()
        keys = words[3:] if command in ("EVALSHA", "EVAL") else words[1:]
        name = self._scripts.get(words[1].lower(), command) if command == "EVALSHA" else command
        first = self._any_node.sub(b"*", keys[0]) if keys else b""
        # An epoch, and whatever else is random, is no part of a kind.
        plain = re.sub(rb"\*/.*|[0-9a-f]{8}[0-9a-f-]*|\d+", b"*", first)
        return f"{name} {plain.decode(errors='replace')}".strip()

    def giver(self, words: Sequence[bytes]) -> Identity | None:
        """The node that a command names first, or None."""
        for word in words[1:]:
            if found := self._any_node.search(word):
                return self._by_node[found[0]]
        return None


def said_by(words: Sequence[bytes], giver: Identity, other: Identity) -> list[bytes]:
    """The command as another node gives it."""
    changes = ((giver.node.encode(), other.node.encode()), (giver.epoch.encode(), other.epoch.encode()))
    changed = list(words)
    for old, new in changes:
        changed = [word.replace(old, new) for word in changed]
    return changed


def rates(
    commands: Iterable[Sequence[bytes]], kind: Callable[[Sequence[bytes]], str], lasted_s: float
) -> dict[str, float]:
    """How often a second each kind came."""
    return {name: count / lasted_s for name, count in Counter(map(kind, commands)).items()}
