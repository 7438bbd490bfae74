"""Load for nodes that something happens to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self


class Traffic(ABC):
    """Sends jobs on a thread of its own until it is stopped; a subclass says which."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.results: list[Any] = []

    @abstractmethod
    def send(self, number: int) -> None:
        """Send the next jobs, the ``number``-th time, and keep their results."""

    def stop(self) -> None:
        """Send no more, and wait for what is being sent. Safe to repeat, and before the start."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(self._pause_s):
            number += 1
            self.send(number)
