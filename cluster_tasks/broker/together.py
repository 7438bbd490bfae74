"""The ends of the members of one message, which are committed some at a time and not each by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

from cluster_tasks.broker.message import Delivery
from cluster_tasks.errors import StaleCommit
from cluster_tasks.keys import Keys

logger = logging.getLogger(__name__)

MARKER_LIVES_S = 7 * 24 * 3600
"""How long it is remembered at least that a member has ended while the message stands, unless that comes to no end."""
AT_ONCE_BYTES = 1 << 20
"""Of results in one script: nothing else is done in Redis meanwhile."""

Commit = Callable[[Sequence[str], Sequence[Any]], list[int]]


class HadEnded(StaleCommit):
    """A member of a message had come to its end before, which stands."""


class _End(NamedTuple):
    job_id: str
    written: Any
    lives_s: int
    same_end: str
    state: str


class Ends:
    """What a delivery of a message has to tell of its members."""

    def __init__(
        self, commit: Commit, keys: Keys, result_prefix: str, delivery: Delivery, message_id: str,
        message_lives_s: int, one_by_one: bool,
    ) -> None:  # fmt: skip
        self.delivery, self._one_by_one = delivery, one_by_one
        self.refused: set[str] = set()
        """Members that had ended before."""
        self._commit, self._keys, self._message_id, self._lives_s = commit, keys, message_id, message_lives_s
        self._prefixes = keys.terminal(""), result_prefix, keys.crashes(""), keys.followed("")
        self._ends: list[_End] = []
        self._bytes = 0
        self._told: list[str | int] = []
        """Job, and seconds that its marker lives, of each end that was committed before."""

    def add(self, job_id: str, written: Any, lives_s: int, same_end: str, state: str) -> None:
        """Have a member end so, now or with those that follow. Raises as ``tell`` does."""
        self._ends.append(_End(job_id, written, lives_s, same_end, state))
        self._bytes += len(written)
        if self._bytes >= AT_ONCE_BYTES:
            self.tell()

    def end(self, job_id: str, *end: Any) -> None:
        """Have a member end as by ``add``; if ends are told one by one, now. Raises HadEnded, and as ``tell`` does."""
        self.add(job_id, *end)
        if self._one_by_one:
            self.tell()
            if job_id in self.refused:
                raise HadEnded(f"job {job_id} had ended before")

    def tell(self, *, last: bool = False) -> None:
        """Commit what was added, and with the ``last`` of it the end of the message.

        A member that had ended before keeps that end. Raises StaleCommit if the delivery was taken away, EndNotStored.
        """
        if not (self._ends or last):
            return
        keys, told = self._keys, self._told if last else []
        names = [keys.unacked(self.delivery.node_id, self.delivery.epoch), keys.counters]
        about = self.delivery.tag, self._lives_s if last else "", MARKER_LIVES_S, len(told) // 2
        arguments = [*about, *self._prefixes, *told, *chain.from_iterable(self._ends)]
        reply = self._commit([*names, keys.terminal(self._message_id)], arguments)
        if 0 in reply:
            raise StaleCommit(
                f"the ends of {reply.count(0)} jobs by {self.delivery.node_id} refused: their delivery was taken away"
            )
        for end, done in zip(self._ends, reply, strict=True):
            if done < 0:
                logger.warning("result %s of job %s refused: it had ended before", end.state, end.job_id)
                self.refused.add(end.job_id)
            self._told += [end.job_id, end.lives_s]
        self._ends.clear()
        self._bytes = 0


_gathering: ContextVar[Ends | None] = ContextVar("gathering", default=None)


def gathering(delivery: Delivery) -> Ends | None:
    """What gathers the ends that this delivery brings, if anything does in this thread."""
    ends = _gathering.get()
    return ends if ends is not None and ends.delivery == delivery else None


@contextmanager
def gathered(ends: Ends) -> Iterator[Ends]:
    """While the block lasts, ends that its delivery brings are added to ``ends``."""
    token = _gathering.set(ends)
    try:
        yield ends
    finally:
        _gathering.reset(token)
