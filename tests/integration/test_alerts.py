"""Alerts reach a webhook, whatever becomes of it, of Redis and of those who send."""

from __future__ import annotations

import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import redis

from cluster_tasks.clock import ManualClock, SystemClock
from cluster_tasks.failover.alerts import ALERTS, OLDEST_S, REFUSED_TRIES, AlertQueue, AlertSender, Webhook
from cluster_tasks.failover.events import EventLog
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect
from tests.waiting import wait_until
from tests.webhook import Hook, serving
from workers.redis_server import RedisServer, free_port

SECRET = "a shared secret"
NewSender = Callable[..., AlertSender]


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def events(client: redis.Redis) -> EventLog:
    return EventLog(client, Keys(), SystemClock())


@pytest.fixture
def hook() -> Iterator[Hook]:
    with serving(Hook()) as hook:
        yield hook


@pytest.fixture
def new_sender(client: redis.Redis, hook: Hook) -> Iterator[NewSender]:
    """Make senders that run, and know of everything that is told from now on, those that may not send as well."""
    senders = []

    def new(url: str = "", timeout_s: float = 5.0, claim_after_s: float = 30.0, **options: object) -> AlertSender:
        queue = AlertQueue(client, Keys(), claim_after_s)
        webhook = Webhook(url or hook.url, SECRET, timeout_s)
        given: Any = {"clock": SystemClock(), "first_wait_s": 0.05, **options}
        senders.append(AlertSender(queue, webhook, "cluster", **given))
        senders[-1].start()
        wait_until(lambda: client.exists(Keys().events) and client.xinfo_groups(Keys().events), message="it listens")
        return senders[-1]

    yield new
    for sender in senders:
        sender.stop()


def nothing_is_pending(client: redis.Redis) -> bool:
    (group,) = client.xinfo_groups(Keys().events)
    last = client.xinfo_stream(Keys().events)["last-generated-id"]
    return bool(group["pending"] == 0 and group["last-delivered-id"] == last)


def test_an_alert_tells_what_happened_and_is_signed(events: EventLog, hook: Hook, new_sender: NewSender) -> None:
    new_sender()
    events.add("node lost", node="a@test", silent_s=3.2)
    wait_until(lambda: hook.taken, message="it arrives")
    (headers, body), (event,) = hook.requests[0], events.latest()
    assert json.loads(body) == {
        "id": event.id, "cluster": "cluster", "kind": "node lost", "timestamp": event.timestamp,
        "facts": {"node": "a@test", "silent_s": 3.2},
    }  # fmt: skip
    signed = f"{headers['x-cluster-timestamp']}.".encode() + body
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["x-cluster-signature"] == f"sha256={expected}"
    assert headers["x-cluster-event"] == event.id
    assert abs(time.time() - int(headers["x-cluster-timestamp"])) < 60
    assert headers["content-type"] == "application/json"


def test_each_alert_is_sent_once_however_many_send_and_nothing_else_is(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    for _ in range(4):
        new_sender()
    for number in range(20):
        events.add("jobs moved", number=number)
        for kind in ALERTS:
            events.add(kind, number=number)
    wait_until(lambda: len(hook.taken) >= 20 * len(ALERTS) and nothing_is_pending(client), 60, "all arrive")
    told = [(event["kind"], event["facts"]["number"]) for event in hook.taken]
    assert sorted(told) == sorted((kind, number) for kind in ALERTS for number in range(20))


def test_a_webhook_that_fails_is_asked_again(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    hook.statuses = [500, 503, 429, 404]
    new_sender()
    events.add("node lost", node="a")
    wait_until(lambda: hook.taken and nothing_is_pending(client), message="it arrives")
    assert len(hook.requests) == 5
    assert len({body for _, body in hook.requests}) == 1


def test_alerts_wait_for_a_webhook_that_is_down(client: redis.Redis, events: EventLog, new_sender: NewSender) -> None:
    hook = Hook(port=free_port())
    new_sender(hook.url)
    for number in range(3):
        events.add("node lost", node=str(number))
    wait_until(lambda: client.xpending(Keys().events, "alerts")["pending"], message="it is tried")
    with serving(hook):
        wait_until(lambda: len(hook.taken) == 3, 30, "they arrive")
    assert [event["facts"]["node"] for event in hook.taken] == ["0", "1", "2"]


def hang(_: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def drip(handler: BaseHTTPRequestHandler) -> None:
    # Each byte comes long before the time-out of a socket.
    with suppress(OSError):
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1_000:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.05)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"nonsense")
    handler.close_connection = True


@pytest.mark.parametrize("behave", [hang, drip, break_off])
def test_a_webhook_that_hangs_holds_a_sender_for_its_time_out_only(
    behave: Callable[[BaseHTTPRequestHandler], None], client: redis.Redis, events: EventLog, hook: Hook,
    new_sender: NewSender,
) -> None:  # fmt: skip
    hook.behave = behave
    new_sender(timeout_s=0.3)
    events.add("node lost", node="a")
    wait_until(lambda: len(hook.requests) >= 2, message="it is tried again")
    hook.behave = None
    wait_until(lambda: hook.taken and nothing_is_pending(client), message="it arrives")


def test_a_redirect_is_not_followed_and_a_refusal_does_not_hold_up_the_others(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    hook.statuses = [302] * REFUSED_TRIES
    new_sender()
    events.add("node lost", node="refused")
    events.add("node lost", node="taken")
    wait_until(lambda: hook.taken and nothing_is_pending(client), message="the second arrives")
    assert [event["facts"]["node"] for event in hook.taken] == ["taken"]
    assert all("method" not in headers for headers, _ in hook.requests)


class CannotTake:
    """A webhook that answers 500 to alerts of this node, and takes all others."""

    def __init__(self, hook: Hook, node: str) -> None:
        self._hook, self._node, self.refused = hook, node, 0
        hook.behave = self

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        event = json.loads(self._hook.requests[-1][1])
        is_taken = event["facts"]["node"] != self._node
        if is_taken:
            self._hook.taken.append(event)
        else:
            self.refused += 1
        handler.send_response(200 if is_taken else 500)
        handler.end_headers()


def test_an_alert_that_the_webhook_cannot_take_lets_the_others_pass_and_is_tried_again(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    failing = CannotTake(hook, "bad")
    new_sender(claim_after_s=0.5, longest_wait_s=0.1, put_off_after_s=0.3)
    events.add("node lost", node="bad")
    for number in range(3):
        events.add("node lost", node=str(number))
    wait_until(lambda: len(hook.taken) == 3, message="the others arrive")
    seen = failing.refused
    wait_until(lambda: failing.refused > seen + 1, message="it is tried again")
    hook.behave = None
    wait_until(lambda: len(hook.taken) == 4 and nothing_is_pending(client), message="it arrives")
    assert [event["facts"]["node"] for event in hook.taken] == ["0", "1", "2", "bad"]


def test_what_a_sender_left_behind_is_found_behind_many_that_the_webhook_cannot_take(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    CannotTake(hook, "bad")
    AlertQueue(client, Keys()).open()
    for node in [*["bad"] * 11, "good"]:
        events.add("node lost", node=node)
    # A sender that has ended in their midst.
    client.xreadgroup("alerts", "alerts", {Keys().events: ">"})
    new_sender(claim_after_s=1.0, longest_wait_s=0.1, put_off_after_s=0.0)
    wait_until(lambda: hook.taken, message="the good one arrives")
    hook.behave = None
    wait_until(lambda: nothing_is_pending(client), message="all arrive")
    assert [event["facts"]["node"] for event in hook.taken] == ["good", *["bad"] * 11]


def test_an_alert_that_has_become_too_old_while_it_was_tried_is_given_up(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    failing, clock = CannotTake(hook, "bad"), ManualClock(time.time())
    # Time may go on amid a try: then the alert is put off, and is given up when it comes up again.
    new_sender(clock=clock, claim_after_s=0.5, longest_wait_s=0.1)
    events.add("node lost", node="bad")
    wait_until(lambda: failing.refused > 1, message="it is tried")
    clock.advance(OLDEST_S + 60)
    wait_until(lambda: nothing_is_pending(client), message="it is given up")
    assert not hook.taken


def test_what_a_killed_sender_was_at_is_sent_by_another(
    redis_url: str, client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    entered = threading.Event()

    def hold(_: BaseHTTPRequestHandler) -> None:
        entered.set()
        time.sleep(2)

    hook.behave = hold
    script = (
        "import sys, time; from cluster_tasks.failover.alerts import *; from cluster_tasks.redis_store import connect;"
        "from cluster_tasks.keys import Keys; from cluster_tasks.clock import SystemClock;"
        "queue = AlertQueue(connect(sys.argv[1]), Keys());"
        "AlertSender(queue, Webhook(sys.argv[2]), 'cluster', SystemClock()).start(); time.sleep(60)"
    )
    AlertQueue(client, Keys()).open()
    with subprocess.Popen([sys.executable, "-c", script, redis_url, hook.url]) as doomed:
        events.add("node lost", node="a")
        assert entered.wait(30)
        doomed.kill()
    hook.behave = None
    new_sender(claim_after_s=0.5)
    wait_until(lambda: hook.kinds() == ["node lost"] and nothing_is_pending(client), message="another sends it")


def test_a_sender_that_is_slow_but_alive_keeps_its_alert(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    # Tried for twice as long as others would let pass before they take over.
    hook.statuses = [500] * 28
    for number in range(3):
        new_sender(f"{hook.url}&sender={number}", claim_after_s=3.0, longest_wait_s=0.3)
    events.add("node lost", node="a")
    wait_until(lambda: hook.taken and nothing_is_pending(client), 20, "it arrives")
    assert len({headers["path"] for headers, _ in hook.requests}) == 1


def test_stopping_a_sender_does_not_wait_for_its_webhook(events: EventLog, hook: Hook, new_sender: NewSender) -> None:
    hook.behave = hang
    sender = new_sender(timeout_s=60)
    events.add("node lost", node="a")
    wait_until(lambda: hook.requests, message="it is at it")
    started_s = time.monotonic()
    sender.stop()
    sender.stop()
    assert time.monotonic() - started_s < 10


def test_alerts_go_on_when_redis_has_forgotten_everything(
    redis_server: RedisServer, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    new_sender()
    events.add("node lost", node="before")
    wait_until(lambda: len(hook.taken) == 1, message="the first arrives")
    redis_server.stop()
    redis_server.start()
    events.add("node lost", node="after")
    wait_until(lambda: len(hook.taken) == 2, message="the second arrives")
    assert [event["facts"]["node"] for event in hook.taken] == ["before", "after"]


def test_what_was_trimmed_or_is_no_event_holds_nobody_up(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    AlertQueue(client, Keys()).open()
    events.add("node lost", node="trimmed")
    client.xreadgroup("alerts", "alerts", {Keys().events: ">"})
    client.xtrim(Keys().events, 0)
    client.xadd(Keys().events, {"strange": "entry"})
    client.xadd(Keys().events, {"kind": "node lost", "timestamp": "soon", "facts": "{}"})
    events.add("node lost", node="a")
    new_sender(claim_after_s=0.1)
    wait_until(lambda: hook.taken and nothing_is_pending(client), message="the good one arrives")
    assert [event["facts"]["node"] for event in hook.taken] == ["a"]


def test_who_may_not_send_leaves_alerts_to_others(
    client: redis.Redis, events: EventLog, hook: Hook, new_sender: NewSender
) -> None:
    allowed = threading.Event()
    new_sender(may_send=allowed.is_set)
    events.add("node lost", node="a")
    time.sleep(0.3)
    assert not hook.requests
    allowed.set()
    wait_until(lambda: hook.taken, message="it arrives")


def test_begin_and_end_of_a_condition_are_told_once_however_many_see_it(client: redis.Redis, events: EventLog) -> None:
    seen = [events.condition("panic guard", "panic guard over") for _ in range(3)]
    blind = events.condition("panic guard", "panic guard over")
    for _ in range(2):
        for condition in seen:
            for _ in range(2):
                condition.holds(silent=2)
        for condition in [blind, *seen, *seen]:
            condition.is_over()
    assert [event.kind for event in events.latest()] == ["panic guard", "panic guard over"] * 2
    assert client.keys("*condition*") == []


def test_a_condition_whose_observers_have_died_is_told_anew_later(client: redis.Redis, events: EventLog) -> None:
    events.condition("no coordinator", "coordinator back").holds()
    assert client.ttl(Keys().condition("no coordinator")) > 0
