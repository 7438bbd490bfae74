"""Clients of a Redis that falls silent."""

from __future__ import annotations

import signal

import psutil
import pytest
import redis

from cluster_tasks.redis_store import connect
from workers.redis_server import RedisServer


def test_a_server_that_falls_silent_costs_one_time_out_and_not_one_for_each_idle_connection(
    redis_server: RedisServer,
) -> None:
    with connect(redis_server.url, socket_timeout=0.2) as client:
        pool = client.connection_pool
        connections = [pool.get_connection() for _ in range(4)]
        for connection in connections:
            pool.release(connection)
        server = psutil.Process(redis_server.pid)
        server.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(redis.TimeoutError):
                client.get("anything")
            # A failover may have been meanwhile: whoever asks again must not ask the server that is silent.
            assert not any(connection.is_connected for connection in connections)
        finally:
            server.send_signal(signal.SIGCONT)
        assert client.ping()
