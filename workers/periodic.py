"""A duty of a node that repeats on a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from cluster_tasks.errors import UnavailableError

logger = logging.getLogger(__name__)


class Periodic:
    """Calls ``duty`` every ``interval_s``. An outage of a service is logged once, and once when it is over."""

    def __init__(self, name: str, interval_s: float, duty: Callable[[], None]) -> None:
        self._name, self._interval_s, self._duty = name, interval_s, duty
        self._stopping, self._woken = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._healthy = True

    def start(self) -> None:
        """Begin; the first call is made at once."""
        self._thread = threading.Thread(target=self._run, name=f"cluster-{self._name}", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Call the duty now, or once more if it is under way."""
        self._woken.set()

    def stop(self) -> None:
        """End, and wait for a call under way. Safe to repeat, and before ``start``."""
        self._stopping.set()
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._duty()
            except UnavailableError as exc:
                if self._healthy:
                    logger.warning("%s is interrupted: %s", self._name, exc)
                self._healthy = False
            except Exception:
                # A node without heartbeat is dead to the others: a fault in one round must not end the thread.
                logger.exception("%s failed, it goes on", self._name)
            else:
                if not self._healthy:
                    logger.warning("%s goes on", self._name)
                self._healthy = True
            self._woken.wait(self._interval_s)
            self._woken.clear()
