"""One snapshot for all who look: a hundred viewers cost what one costs."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster_tasks.clock import Clock
from cluster_tasks.errors import UnavailableError

FRESH_S = 0.9
"""A little less than browsers wait between two looks."""
GZIP_LEVEL = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent to whoever asks, made once."""

    status: int
    body: bytes
    compressed: bytes


class SharedSnapshot:
    """Takes a snapshot when somebody asks, off the event loop, and not more than one in ``FRESH_S``.

    That Redis does not answer is kept for as long as an answer of it: it is asked by one at a time.
    """

    def __init__(self, take: Callable[[], dict[str, Any]], clock: Clock) -> None:
        self._take, self._clock = take, clock
        self._latest: asyncio.Future[tuple[Answer, float]] | None = None
        self._is_stale = False

    async def get(self) -> Answer:
        """Return the snapshot of now, or of ``FRESH_S`` ago at most."""
        if self._latest is None or (self._latest.done() and self._is_old(self._latest)):
            self._is_stale = False
            self._latest = asyncio.get_running_loop().run_in_executor(None, self._make)
        # One who goes away must not take it from the others.
        answer, _ = await asyncio.shield(self._latest)
        return answer

    def expire(self) -> None:
        """Have the next who asks get one that is taken after now, or the one after that if one is being taken."""
        self._is_stale = True

    def _is_old(self, latest: asyncio.Future[tuple[Answer, float]]) -> bool:
        if self._is_stale or latest.cancelled() or latest.exception() is not None:
            return True
        _, made_at_s = latest.result()
        return self._clock.monotonic() - made_at_s >= FRESH_S

    def _make(self) -> tuple[Answer, float]:
        try:
            status, told = 200, self._take()
        except UnavailableError as exc:
            status, told = 503, {"error": str(exc)}
        body = json.dumps(told, separators=(",", ":")).encode()
        return Answer(status, body, gzip.compress(body, GZIP_LEVEL)), self._clock.monotonic()
