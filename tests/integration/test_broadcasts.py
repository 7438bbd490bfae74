"""What is told to all workers, over Redis' publish and subscribe."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from kombu import Consumer, Exchange, Queue

from tests.process.jobs import make_jobs

WITHIN_S = 120.0


def test_a_reader_of_broadcasts_never_waits_for_what_is_not_there(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_url)
    app = make_jobs().app
    with app.connection_for_read() as connection:
        exchange = Exchange("told", type="fanout")
        consumer = Consumer(
            connection, [Queue("told.me", exchange)], callbacks=[lambda body, message: None], no_ack=True
        )
        with consumer:
            channel = connection.default_channel
            with suppress(TimeoutError):
                connection.drain_events(timeout=1)  # It subscribes.
            # The event loop calls this for a connection that it takes for readable.
            reading = threading.Thread(target=lambda: [channel._receive() for _ in range(3)], daemon=True)
            reading.start()
            reading.join(WITHIN_S)
            assert not reading.is_alive()
    app.close()
