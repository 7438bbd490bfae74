"""Clients of a Redis that falls silent."""

from __future__ import annotations

import signal
from typing import Any

import psutil
import pytest
import redis

from cluster_tasks.redis_store import RememberedScript, connect
from workers.redis_server import RedisServer


class Forgetful(redis.Redis):
    """A client of a Redis that forgets each script as soon as it has been loaded."""

    def script_load(self, script: Any) -> Any:
        loaded = super().script_load(script)
        self.script_flush()
        return loaded


def test_a_script_runs_once_however_often_redis_forgets_it(redis_server: RedisServer) -> None:
    with Forgetful.from_url(redis_server.url) as client:
        count = RememberedScript(client, "return redis.call('INCRBY', KEYS[1], ARGV[1])")
        assert [count(keys=["count"], args=[2]) for _ in range(2)] == [2, 4]
        client.script_flush()
        assert count(["count"], [1]) == 5


def test_a_server_that_falls_silent_costs_one_time_out_and_not_one_for_each_idle_connection(
    redis_server: RedisServer,
) -> None:
    with connect(redis_server.url, socket_timeout=2.0) as client:
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
