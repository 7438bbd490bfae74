"""The metrics of the cluster over HTTP."""

from __future__ import annotations

import logging
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


class MetricsServer:
    """Serves metrics at ``http://<host>:<port>/metrics`` on a thread of its own; with port 0 nowhere."""

    def __init__(self, metrics: Collector, host: str, port: int) -> None:
        self._metrics, self._host, self._port = metrics, host, port
        self._running: tuple[WSGIServer, threading.Thread] | None = None

    def start(self) -> None:
        """Begin. A port that is taken is logged: who coordinates must do it unobserved, too."""
        if not self._port or self._running is not None:
            return
        registry = CollectorRegistry()
        registry.register(self._metrics)
        try:
            self._running = start_http_server(self._port, self._host, registry)
        except OSError as exc:
            logger.error("no metrics are served at %s:%d (CLUSTER_METRICS_PORT): %s", self._host, self._port, exc)
        else:
            logger.info("metrics are served at http://%s:%d/metrics", self._host, self._port)

    def stop(self) -> None:
        """End. Safe to repeat, and before ``start``."""
        if self._running is not None:
            server, thread = self._running
            self._running = None
            server.shutdown()
            server.server_close()
            thread.join()
