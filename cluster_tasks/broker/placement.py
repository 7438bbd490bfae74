"""Putting messages on lists, each move one script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import redis

from cluster_tasks.broker.message import Placement
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import load_script, script_source, text

_PACKAGE = "cluster_tasks.broker"


def placing_script(name: str) -> str:
    """Return the source of a script that uses the shared ``place`` function."""
    return f"{script_source(_PACKAGE, 'placing')}\n{script_source(_PACKAGE, name)}"


class Placer:
    """Places and moves messages. Errors of Redis pass through: Kombu and the callers each have their own policy."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._keys = keys
        self._place = client.register_script(placing_script("place"))
        self._move_held = client.register_script(placing_script("move_held"))
        self._move_listed = client.register_script(placing_script("move_listed"))
        self._set_aside = load_script(client, _PACKAGE, "set_aside")
        self.index = [keys.epochs, keys.draining, keys.backlog, keys.idle, keys.serves]
        """The keys that every placing script begins with."""

    def place(self, placements: Iterable[Placement]) -> list[str]:
        """Put messages on their lists, all in one step; return the list that each went to."""
        arguments = [part for placement in placements for part in placement.arguments()]
        return [text(target) for target in self._place(self.index, [self._keys.bell_prefix, *arguments])]

    def move_held(self, source: str, held: Iterable[tuple[str, Placement]]) -> int:
        """Move deliveries out of the hash ``source``; return how many were still there."""
        arguments = [part for tag, placement in held for part in (tag, *placement.arguments())]
        return cast(int, self._move_held([*self.index, source], [self._keys.bell_prefix, *arguments]))

    def move_listed(self, source: str, queue: str, listed: Sequence[Placement]) -> int:
        """Move the head of the list ``source``, part of ``queue`` in the index; return how many were moved."""
        arguments = [part for placement in listed for part in placement.arguments()]
        return cast(int, self._move_listed([*self.index, source], [self._keys.bell_prefix, queue, *arguments]))

    def set_aside_held(self, source: str, tag: str | bytes, message: bytes) -> None:
        """Keep a message of the hash ``source`` that cannot be decoded for inspection, if it is still there."""
        self._set_aside([self._keys.undecodable, source, self._keys.backlog], [message, tag, ""])

    def set_aside_listed(self, source: str, queue: str, message: bytes) -> None:
        """The same for the list ``source``, part of ``queue`` in the index."""
        self._set_aside([self._keys.undecodable, source, self._keys.backlog], [message, "", queue])
