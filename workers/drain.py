"""How a node leaves: it drains, lets what runs end until a deadline, hands back the rest, and its process ends."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cluster_tasks.errors import UnavailableError

logger = logging.getLogger(__name__)

EXIT_GRACE_S = 5.0
"""How long the worker may take to end after the deadline, when nothing of it is left to run."""
TRY_AGAIN_S = 0.2


class Departure:
    """Sees to it that a worker that was told to end gives all its jobs away, and ends, whatever its pool does.

    A pool of processes under load can take half a minute to be joined, and threads cannot be ended at all.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        drain: Callable[[], None],
        hand_back: Callable[[], bool],
        hopeless: Callable[[], bool],
        foreign: Callable[[], list[str]],
        leave: Callable[[], None],
        exit_process: Callable[[int], None] | None = None,
    ) -> None:
        """``hand_back`` returns whether nothing is left running, ``foreign`` the ids of jobs that nobody can take.

        ``hopeless`` says whether all that runs was given to others: then there is nothing to wait for.
        """
        self._timeout_s, self._exit_process = timeout_s, exit_process or end_process
        self._drain, self._hand_back, self._foreign, self._leave = drain, hand_back, foreign, leave
        self._hopeless = hopeless
        self._begun, self._ended = threading.Event(), threading.Event()
        self._exit_code = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Be ready."""
        self._thread = threading.Thread(target=self._run, name="cluster-departure", daemon=True)
        self._thread.start()

    @property
    def begun(self) -> bool:
        """Whether the worker was told to end."""
        return self._begun.is_set()

    def begin(self, exit_code: int = 0) -> None:
        """The worker was told to end, with this code. Does not wait: a signal handler calls it. Safe to repeat."""
        if not self.begun:
            self._exit_code = exit_code
            self._begun.set()

    def stop(self) -> None:
        """The worker has ended by itself. Safe to repeat, and before ``start``."""
        self._ended.set()
        self._begun.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        self._begun.wait()
        deadline_s = time.monotonic() + self._timeout_s
        self._insist(self._drain)
        while (left_s := deadline_s - time.monotonic()) > 0 and not self._hopeless():
            if self._ended.wait(min(left_s, TRY_AGAIN_S)):
                return
        idle = self._insist(self._hand_back)
        if self._ended.wait(EXIT_GRACE_S if idle else 0):
            return
        if waits_for := self._foreign():
            # Celery's warm shutdown waits for them, and nobody would run them again.
            logger.warning("this node has left; the worker waits for jobs of other queues: %s", ", ".join(waits_for))
        while self._foreign():
            if self._ended.wait(TRY_AGAIN_S):
                return
        self._end()

    def _insist(self, step: Callable[[], bool | None]) -> bool | None:
        """Do it as soon as Redis answers: what is not given away in good order is charged as a crash."""
        while not self._ended.is_set():
            try:
                return step()
            except UnavailableError as exc:
                logger.warning("leaving is held up: %s", exc)
                self._ended.wait(TRY_AGAIN_S)
        return None

    def _end(self) -> None:
        logger.warning("the pool of this worker does not end in time, so the process does")
        self._leave()
        self._exit_process(self._exit_code)


def end_process(code: int) -> None:
    """End this process now, whatever its threads do; the children of its pool end with it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
