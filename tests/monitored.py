"""What a Redis is told, word for word: ``MONITOR``, with the scripts of the project by name."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any

import cluster_tasks
from benchmarks.commands import BY_SCRIPT, LINE, unquoted
from cluster_tasks.redis_store import connect


@dataclass(slots=True)
class Command:
    """One command that crossed the wire, and what Redis did for it if it was a script."""

    at_s: float
    client: str
    """Its address."""
    words: tuple[bytes, ...]
    name: str
    """That of a script, ``broker.fetch``, else the command in capitals."""
    inside: list[str] = field(default_factory=list)
    """The commands that the script called."""

    @property
    def size(self) -> int:
        """Bytes on the wire, from the client to Redis."""
        return len(b"*%d\r\n" % len(self.words)) + sum(len(b"$%d\r\n%b\r\n" % (len(word), word)) for word in self.words)

    def mentions(self, word: str) -> bool:
        """Whether it says this anywhere."""
        return any(word.encode() in each for each in self.words)


class Monitor:
    """Sees what a Redis is told from its start on. Scripts have names if they are loaded after that."""

    def __init__(self, url: str) -> None:
        self._client = connect(url, socket_timeout=60.0)
        self._client.script_flush()
        self._connection = self._client.connection_pool.get_connection()
        self._connection.send_command("MONITOR")
        self._connection.read_response()
        self._names: dict[bytes, str] = {}
        self._sources = script_sources()

    def commands(self) -> list[Command]:
        """Return what has come since the last call, in the order in which Redis did it.

        Left out are calls of scripts that it did not know yet, which it refuses; they come again.
        """
        mark = secrets.token_hex(8).encode()
        self._client.echo(mark)
        found: list[Command] = []
        while True:
            at_s, client, words = self._next()
            if words[-1] == mark:
                return found
            if client == BY_SCRIPT.decode():
                found[-1].inside.append(words[0].upper().decode())
            elif name := self._name(words):
                found.append(Command(at_s, client, words, name))

    def close(self) -> None:
        """See no more."""
        self._connection.disconnect()
        self._client.close()

    def _next(self) -> tuple[float, str, tuple[bytes, ...]]:
        line: Any = self._connection.read_response(disable_decoding=True)
        matched = LINE.match(line)
        assert matched is not None, line
        return float(matched["at"]), matched["who"].decode(), tuple(unquoted(matched["words"]))

    def _name(self, words: tuple[bytes, ...]) -> str:
        command = words[0].upper()
        if command == b"SCRIPT" and words[1].upper() == b"LOAD":
            self._learn(words[2])
        elif command == b"EVAL":
            return self._learn(words[1])
        elif command == b"EVALSHA":
            return self._names.get(words[1], "")
        return command.decode()

    def _learn(self, text: bytes) -> str:
        # Shared parts stand in front, so a script ends with the file it is named after.
        of_file = [name for name, source in self._sources.items() if text.endswith(source)]
        name = of_file[0] if of_file else "foreign"
        self._names[sha1(text, usedforsecurity=False).hexdigest().encode()] = name
        return name


def script_sources() -> dict[str, bytes]:
    """Return the texts of all scripts by package and file: ``broker.fetch``."""
    root = Path(cluster_tasks.__file__).parent
    return {f"{path.parts[-3]}.{path.stem}": path.read_bytes() for path in root.rglob("scripts/*.lua")}


@contextmanager
def monitored(url: str) -> Iterator[Monitor]:
    """See what a Redis is told for as long as the block lasts."""
    monitor = Monitor(url)
    try:
        yield monitor
    finally:
        monitor.close()
