"""What Prometheus' client asks for metrics: one snapshot for each scrape, within a time limit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cluster_tasks.errors import UnavailableError
from cluster_tasks.metrics.families import empty_families, families
from cluster_tasks.metrics.snapshot import BrokerState, Snapshot
from cluster_tasks.model import Node

logger = logging.getLogger(__name__)

SCRAPE_S = 2.0
"""The longest that a scrape takes: Flower answers nobody meanwhile."""
T = TypeVar("T")


class ClusterCollector(Collector):
    """The metrics of a cluster. Safe to share between threads."""

    def __init__(
        self, lease_s: float, broker: Callable[[], BrokerState], registry: Callable[[], Sequence[Node]],
        cache: Callable[[], Mapping[str, float]] | None, limit_s: float = SCRAPE_S,
    ) -> None:  # fmt: skip
        """The functions read what their services know, and raise UnavailableError; ``cache`` is None if there is none.

        A scrape takes ``limit_s`` at most, whatever they do.
        """
        self._lease_s, self._limit_s = lease_s, limit_s
        self._broker, self._registry = Reading("the broker", broker), Reading("the registry", registry)
        self._cache = Reading("the cache", cache) if cache else None

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, and without I/O."""
        return empty_families()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of now. Never raises for want of a service: ``cluster_up`` and its like say so."""
        until_s = time.monotonic() + self._limit_s
        for reading in (self._broker, self._registry, self._cache):
            if reading is not None:
                reading.begin()
        broker, registered = self._broker.end(until_s), self._registry.end(until_s)
        cache = self._cache.end(until_s) if self._cache else None
        return families(Snapshot(self._lease_s, broker, registered, cache, self._cache is not None))


class Reading(Generic[T]):
    """Calls a function on a thread of its own, that nobody has to wait for. Who asks meanwhile gets the same answer."""

    def __init__(self, of: str, read: Callable[[], T]) -> None:
        self._of, self._read = of, read
        self._lock = threading.Lock()
        self._call: _Call[T] | None = None
        self._healthy = True

    def begin(self) -> None:
        """Call it, unless a call is under way."""
        with self._lock:
            if self._call is None or self._call.ended.is_set():
                self._call = _Call()
                thread = threading.Thread(target=self._run, args=(self._call,), name="cluster-scrape", daemon=True)
                thread.start()

    def end(self, until_s: float) -> T | None:
        """Return what the call returned; None: it failed, or has not returned at ``until_s`` of the monotonic clock."""
        with self._lock:
            call = self._call
        assert call is not None
        in_time = call.ended.wait(max(0.0, until_s - time.monotonic()))
        problem = call.problem if in_time else "it does not answer in time"
        if bool(problem) is self._healthy:
            logger.warning("%s %s", self._of, f"is not in the metrics: {problem}" if problem else "is in them again")
        self._healthy = not problem
        return call.result if in_time else None

    def _run(self, call: _Call[T]) -> None:
        try:
            call.result = self._read()
        except UnavailableError as exc:
            call.problem = str(exc)
        except Exception as exc:
            # One value that cannot be read must not take all other metrics of the process away.
            logger.exception("what %s knows could not be read for the metrics", self._of)
            call.problem = repr(exc)
        finally:
            call.ended.set()


class _Call(Generic[T]):
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.result: T | None = None
        self.problem = ""
