"""Events that somebody should know of now, sent to a webhook: each at least once, whoever dies.

The stream of events is the queue. A consumer group of Redis hands each event to one sender and remembers it until the
webhook has taken it; what a sender leaves behind is taken over by another. So an alert is neither multiplied by the
number of processes nor lost with one.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import random
import threading
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from cluster_tasks.clock import Clock
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.failover.events import ClusterEvent, decode_event
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import foreign_errors, text

logger = logging.getLogger(__name__)

ALERTS = frozenset(
    {
        "node lost", "job quarantined", "breaker open", "breaker closed", "panic guard", "panic guard over",
        "no coordinator", "coordinator back",
    }
)  # fmt: skip
"""The kinds of events that are sent."""
TIMESTAMP_HEADER = "X-Cluster-Timestamp"
SIGNATURE_HEADER = "X-Cluster-Signature"
EVENT_HEADER = "X-Cluster-Event"
GROUP = SENDER = "alerts"
LOOK_S = 1.0
TIMEOUT_S = 10.0
"""Of one request as a whole, however slowly the other side speaks."""
LONGEST_WAIT_S = 15.0
CLAIM_AFTER_S = 30.0
"""More than the longest wait and a request together: whoever is silent for so long has died."""
REFUSED_TRIES = 5
PASSING = frozenset({408, 425, 429})
"""Statuses from 300 on and below 500 that may be others the next time."""
PUT_OFF_AFTER_S = 60.0
"""An alert that a webhook has answered for so long, and never taken, lets the others pass: it may be the only one."""
OLDEST_S = 24 * 3600.0


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a request: HMAC-SHA256 over timestamp, a dot, and the body as sent."""
    return "sha256=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where alerts go. No redirect is followed and no proxy used: the URL may be a secret."""

    url: str
    secret: str | None = None
    timeout_s: float = TIMEOUT_S

    def post(self, event_id: str, timestamp: str, body: bytes) -> int:
        """Return the status of the answer. Raises OSError or HTTPException if there is none in time."""
        parts = urlsplit(self.url)
        assert parts.hostname
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_s)
        # The time-out of a socket begins anew with each byte.
        deadline = threading.Timer(self.timeout_s, _cut, [connection])
        deadline.daemon = True
        deadline.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", target, body, self._headers(event_id, timestamp, body))
            return connection.getresponse().status
        finally:
            deadline.cancel()
            connection.close()

    def _headers(self, event_id: str, timestamp: str, body: bytes) -> dict[str, str]:
        headers = {"Content-Type": "application/json", EVENT_HEADER: event_id, TIMESTAMP_HEADER: timestamp}
        parts = urlsplit(self.url)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
        if self.secret:
            headers[SIGNATURE_HEADER] = sign(self.secret, timestamp, body)
        return headers


def _cut(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(2)


class AlertQueue:
    """The events as senders share them. Raises BrokerUnavailable."""

    def __init__(self, client: redis.Redis, keys: Keys, claim_after_s: float = CLAIM_AFTER_S) -> None:
        self._client, self._stream, self._claim_after_ms = client, keys.events, int(claim_after_s * 1000)

    def open(self) -> None:
        """Keep for the senders whatever is told from now on. Safe to repeat."""
        with foreign_errors(BrokerUnavailable, "opening the queue of alerts"):
            self._make_group("$")

    def next(self, wait_s: float) -> tuple[str, ClusterEvent | None] | None:
        """Return an event by its id, or an id whose event is no longer kept; None if none came within ``wait_s``."""
        with foreign_errors(BrokerUnavailable, "reading events for alerts"):
            try:
                return self._next(wait_s)
            except redis.ResponseError as exc:
                if "NOGROUP" not in str(exc):
                    raise
                # A Redis that has forgotten the group has forgotten the events that were told before, too.
                self._make_group("0")
                return None

    def keep(self, event_id: str) -> None:
        """Say that this sender still works on an event."""
        with foreign_errors(BrokerUnavailable, "keeping an alert"):
            self._client.xclaim(self._stream, GROUP, SENDER, 0, [event_id], justid=True)

    def done(self, event_id: str) -> None:
        """Let go of an event."""
        with foreign_errors(BrokerUnavailable, "letting go of an alert"):
            self._client.xack(self._stream, GROUP, event_id)

    def _make_group(self, start: str) -> None:
        with suppress(redis.exceptions.ResponseError):  # It is there.
            self._client.xgroup_create(self._stream, GROUP, start, mkstream=True)

    def _next(self, wait_s: float) -> tuple[str, ClusterEvent | None] | None:
        # XAUTOCLAIM would look at ten of them, and never come to what is behind ten alerts that are put off.
        left: Any = self._client.xpending_range(self._stream, GROUP, "-", "+", 1, idle=self._claim_after_ms)
        for event_id in [each["message_id"] for each in left]:
            entries: Any = self._client.xclaim(self._stream, GROUP, SENDER, self._claim_after_ms, [event_id])
            # None if another was faster. Redis 7 also forgets what it keeps no more, Redis 6.2 gives it without its id.
            if entries:
                return _read(entries[0]) if entries[0][0] else (text(event_id), None)
        streams: Any = self._client.xreadgroup(
            GROUP, SENDER, {self._stream: ">"}, count=1, block=max(int(wait_s * 1000), 1)
        )  # fmt: skip
        return _read(streams[0][1][0]) if streams else None


def _read(entry: tuple[bytes, dict[bytes, bytes]]) -> tuple[str, ClusterEvent]:
    event = decode_event(*entry)
    return event.id, event


class AlertSender:
    """Sends alerts on a thread of its own, while ``may_send`` says so; nothing waits for it."""

    def __init__(
        self, queue: AlertQueue, webhook: Webhook, cluster: str, clock: Clock,
        may_send: Callable[[], bool] = lambda: True, first_wait_s: float = 1.0,
        longest_wait_s: float = LONGEST_WAIT_S, put_off_after_s: float = PUT_OFF_AFTER_S,
    ) -> None:  # fmt: skip
        self._queue, self._webhook, self._cluster, self._clock, self._may_send = (
            queue,
            webhook,
            cluster,
            clock,
            may_send,
        )
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._put_off_after_s = put_off_after_s
        self._put_off: set[str] = set()
        """The ids of alerts that let others pass. They are tried once whenever they come up again."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._healthy = True

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="cluster-alerts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; a request under way is not waited for long, another sender repeats it. Safe to repeat, and at first."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * LOOK_S)

    def _run(self) -> None:
        is_open = False
        while not self._stopping.is_set():
            try:
                if not is_open:
                    # Before it may send: what is told until somebody may is not lost.
                    self._queue.open()
                    is_open = True
                if not self._may_send():
                    self._stopping.wait(LOOK_S)
                elif found := self._queue.next(LOOK_S):
                    self._handle(*found)
            except BrokerUnavailable as exc:
                logger.debug("alerts wait: %s", exc)
                self._stopping.wait(LOOK_S)
            except Exception:
                logger.exception("an alert could not be handled, others will")
                self._stopping.wait(LOOK_S)

    def _handle(self, event_id: str, event: ClusterEvent | None) -> None:
        if event is not None and event.kind in ALERTS and not self._deliver(event):
            return
        self._put_off.discard(event_id)
        self._queue.done(event_id)

    def _deliver(self, event: ClusterEvent) -> bool:
        """Try until the webhook takes it or refuses it for good, or it is too old.

        False if this sender ends before, or the alert is put off: then it is pending, and comes up again.
        """
        told = {"id": event.id, "cluster": self._cluster, "kind": event.kind, "timestamp": event.timestamp}
        body = json.dumps({**told, "facts": event.facts}).encode()
        tries, wait_s, began_s = 0, 0.0, self._clock.monotonic()
        while not self._stopping.wait(wait_s):
            if self._clock.time() - event.timestamp > OLDEST_S:
                logger.warning("an alert of yesterday is not sent any more: %s %s", event.kind, event.facts)
                return True
            with suppress(BrokerUnavailable):
                self._queue.keep(event.id)
            tries, (problem, status) = tries + 1, self._try(event.id, body)
            if not problem:
                return True
            if 0 < status < 500 and status not in PASSING and tries >= REFUSED_TRIES:
                logger.error("the webhook refuses an alert (%s): %s %s", problem, event.kind, event.facts)
                return True
            tried_s = self._clock.monotonic() - began_s
            if status >= 500 and (event.id in self._put_off or tried_s > self._put_off_after_s):
                self._put_off.add(event.id)
                return False
            # Many senders that saw the same outage must not come back at the same moment.
            wait_s = min(self._first_wait_s * 2.0 ** min(tries - 1, 30), self._longest_wait_s) * random.uniform(0.5, 1)
        return False

    def _try(self, event_id: str, body: bytes) -> tuple[str, int]:
        """Return what was wrong, if anything, and the status of the answer; 0 if there was none."""
        problem, status = "", 0
        try:
            status = self._webhook.post(event_id, str(int(self._clock.time())), body)
        except OSError as exc:
            problem = f"{type(exc).__name__}: {exc}"
        except http.client.HTTPException as exc:
            problem = type(exc).__name__
        if status and not 200 <= status < 300:
            problem = f"status {status}"
        if bool(problem) is self._healthy:
            logger.warning(
                "the webhook of alerts %s",
                f"does not take one, it is tried again: {problem}" if problem else "works again",
            )
        self._healthy = not problem
        return problem, status
