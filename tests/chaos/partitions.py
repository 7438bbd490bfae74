"""Nodes that can be cut off from Redis, alone and in one direction: packets get lost, and nobody is told.

In network namespaces where this process may make them, over a proxy elsewhere. Both stay on this machine: an address
of a namespace is reached over a pair of interfaces that leads into it and nowhere else.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from tests.process.proxy import Wire, wire_to
from tests.servers import missing, redis_for_results
from workers.redis_server import HOST, RedisServer

EVERYTHING_IS_LOST = ("bfifo", "limit", "1")
"""A queue in which no packet finds room."""
NOTHING_IS_LOST = ("pfifo",)
_numbers = count(1)


class Link(Protocol):
    """The way of one node to Redis."""

    url: str
    """Where the node finds it."""
    within: tuple[str, ...]
    """Words before the node's command."""
    address: str
    """Where a server of this machine must listen to be found by this way."""

    def way_to(self, port: int) -> str:
        """The ``host:port`` by which the node finds such a server; it is cut with the rest."""

    def cut(self, *, requests: bool = True, replies: bool = True) -> None:
        """Lose what the node sends, what it is sent, or both."""

    def heal(self) -> None:
        """Lose nothing any more. Safe to repeat."""


class Namespace:
    """A network namespace that reaches one address of this machine, and nothing else."""

    def __init__(self) -> None:
        self._name = f"chaos{os.getpid()}n{next(_numbers)}"
        number = self._name.removeprefix("chaos")
        self._outer, self._inner = f"o{number}", f"i{number}"
        self.within: tuple[str, ...] = ("ip", "netns", "exec", self._name)
        self.address, self._own_address = _free_pair()
        self.url = ""

    def way_to(self, port: int) -> str:
        return f"{self.address}:{port}"

    def make(self) -> None:
        """Make it, with a pair of interfaces into it."""
        inside = ("ip", "-n", self._name)
        _run("ip", "netns", "add", self._name)
        _run("ip", "link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self._name)
        _run("ip", "address", "add", f"{self.address}/30", "dev", self._outer)
        _run("ip", "link", "set", self._outer, "up")
        _run(*inside, "address", "add", f"{self._own_address}/30", "dev", self._inner)
        _run(*inside, "link", "set", self._inner, "up")
        _run(*inside, "link", "set", "lo", "up")

    def cut(self, *, requests: bool = True, replies: bool = True) -> None:
        self._queue(
            EVERYTHING_IS_LOST if requests else NOTHING_IS_LOST, EVERYTHING_IS_LOST if replies else NOTHING_IS_LOST
        )

    def heal(self) -> None:
        self._queue(NOTHING_IS_LOST, NOTHING_IS_LOST)

    def _queue(self, requests: tuple[str, ...], replies: tuple[str, ...]) -> None:
        _run("tc", "-n", self._name, "qdisc", "replace", "dev", self._inner, "root", *requests)
        _run("tc", "qdisc", "replace", "dev", self._outer, "root", *replies)

    def remove(self) -> None:
        """Remove it, and the interfaces with it. Safe to repeat, and when it was made in part."""
        for words in (("netns", "delete", self._name), ("link", "delete", self._outer)):
            subprocess.run(["ip", *words], capture_output=True, check=False)


class ProxyLink:
    """The same over a proxy. What it is to lose arrives late instead, as what TCP sends again."""

    within: tuple[str, ...] = ()
    address = HOST

    def __init__(self, stack: ExitStack, port: int) -> None:
        """To the Redis at ``port``; ``stack`` ends the proxies."""
        self._stack, self._wires = stack, dict[int, Wire]()
        self.url = f"redis://{self.way_to(port)}/0"

    def way_to(self, port: int) -> str:
        if port not in self._wires:
            self._wires[port] = self._stack.enter_context(wire_to(port))
        return urlsplit(self._wires[port].url).netloc

    def cut(self, *, requests: bool = True, replies: bool = True) -> None:
        for wire in self._wires.values():
            wire.hold(requests=requests, replies=replies)

    def heal(self) -> None:
        self.cut(requests=False, replies=False)


def can_make_namespaces() -> bool:
    """Whether this process may. Ends the test in CI if it may, and the programs are not there."""
    if os.geteuid() != 0:
        return False
    if not (shutil.which("ip") and shutil.which("tc")):
        missing("iproute2 is not installed: it makes the networks of the nodes")
    name = f"chaos{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made


@contextmanager
def redis_behind_links(directory: Path, number: int) -> Iterator[tuple[RedisServer, list[Link], str]]:
    """A Redis, so many ways to it that can be cut, and its address on a way that cannot: a Unix socket."""
    direct = directory / "redis.sock"
    socket = f"unixsocket {direct}"
    with ExitStack() as stack:
        if can_make_namespaces():
            spaces = [Namespace() for _ in range(number)]
            for space in spaces:
                stack.callback(space.remove)
                space.make()
            bind = f"bind 127.0.0.1 {' '.join(space.address for space in spaces)}"
            # It has no password, and none but these namespaces reach it.
            server = stack.enter_context(redis_for_results(directory, extra=[bind, "protected-mode no", socket]))
            for space in spaces:
                space.url = f"redis://{space.address}:{server.port}/0"
            yield server, list(spaces), f"unix://{direct}"
        else:
            server = stack.enter_context(redis_for_results(directory, extra=[socket]))
            yield server, [ProxyLink(stack, server.port) for _ in range(number)], f"unix://{direct}"


def _free_pair() -> tuple[str, str]:
    """Two addresses of a network that is set apart for tests of networks, and not in use here."""
    used = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    while True:
        first = random.SystemRandom().randrange(2**15) * 4
        outer, inner = (f"198.{18 + (first >> 16)}.{first >> 8 & 255}.{(first & 255) + host}" for host in (1, 2))
        if f" {outer}/" not in used:
            return outer, inner


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)
