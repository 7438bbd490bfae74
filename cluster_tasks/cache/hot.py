"""Which keys a node is asked for most, so that its processes begin with them in their memory.

Processes of nodes tell how often their memory was hit. That is summed in Redis for each node and for all together, by
the hour, and forgotten after two. A process that begins takes the hottest of its node, as a restarted one finds them;
of a node that nobody has heard of, those of all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from cluster_tasks.cache.base import check_keys, check_namespace
from cluster_tasks.cache.connection import CacheConnection, Command, Refusal
from cluster_tasks.cache.local import Memory, Place
from cluster_tasks.clock import Clock
from cluster_tasks.errors import CacheUnavailable
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import text

logger = logging.getLogger(__name__)

TELL_EVERY_S = 10.0
TOLD = 200
"""Keys that a process tells of at a time."""
KEPT = 2_000
"""Keys of a node and hour."""
WARMED = 500
"""Keys that a process begins with: read within a fraction of a second."""
PERIOD_S = 3600
ALL = ""
"""In the place of a node's id."""


class HotKeys:
    """What this process was asked for, and what its node was asked for before. Safe to share between threads."""

    def __init__(self, memory: Memory, connection: CacheConnection, keys: Keys, clock: Clock) -> None:
        self._memory, self._connection, self._keys, self._clock = memory, connection, keys, clock
        self.node_id = ""
        """Of this process; empty: it is of none, and tells nothing."""
        self._told_at_s = clock.monotonic()

    def due(self, *, at_once: bool = False) -> list[Command]:
        """Return the commands that tell what was not told yet; none if that was done within ``TELL_EVERY_S``."""
        now_s = self._clock.monotonic()
        if not self.node_id or (now_s - self._told_at_s < TELL_EVERY_S and not at_once):
            return []
        self._told_at_s = now_s
        hottest = self._memory.take_hottest(TOLD)
        commands: list[Command] = []
        for name in (self._sums(self.node_id, 0), self._sums(ALL, 0)) if hottest else ():
            commands += [("ZINCRBY", name, hits, "\0".join(place)) for place, hits in hottest]
            commands += [("ZREMRANGEBYRANK", name, 0, -KEPT - 1), ("EXPIRE", name, 2 * PERIOD_S)]
        return commands

    def hottest(self) -> list[Place]:
        """Return where to find what the node of this process is asked for most; [] while the cache is away."""
        try:
            return self._hottest_of(self.node_id) or self._hottest_of(ALL)
        except CacheUnavailable as exc:
            logger.debug("this process begins with an empty cache: %s", exc)
            return []

    def _hottest_of(self, node_id: str) -> list[Place]:
        commands = [("ZREVRANGE", self._sums(node_id, ago), 0, WARMED - 1) for ago in (0, 1)]
        replies = self._connection.pipeline(commands, "reading hot keys", may_refuse=True)
        known = [members for members in replies if not isinstance(members, Refusal)]
        found = dict.fromkeys(place for members in known for place in _places(members))
        return list(found)[:WARMED]

    def _sums(self, node_id: str, ago: int) -> str:
        return self._keys.cache_hot(node_id, int(self._clock.time()) // PERIOD_S - ago)


def _places(members: list[bytes]) -> Iterator[Place]:
    for member in members:
        try:
            namespace, _, key = text(member).partition("\0")
            check_keys([key])
            yield check_namespace(namespace), key
        except ValueError:  # Somebody else wrote it; a node begins without.
            continue
