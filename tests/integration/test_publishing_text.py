"""Publishing the text of a job: a real Redis, and deliveries that stand, are taken away, or come twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from cluster_tasks.clock import ManualClock, SystemClock
from cluster_tasks.errors import StaleCommit, StreamAbandoned
from cluster_tasks.keys import Keys
from cluster_tasks.redis_store import connect, text
from cluster_tasks.streaming import publishing
from cluster_tasks.streaming.entries import Entry, checksum
from cluster_tasks.streaming.publishing import WINDOW, Origin, Publisher
from cluster_tasks.streaming.reading import Chunk, Event, Reading, Restarted
from tests.waiting import wait_until
from workers.redis_server import RedisServer

KEYS, JOB, UNACKED = Keys(), "the-job", "cluster:unacked:a@test/1"
STREAM, READER = KEYS.stream(JOB), KEYS.stream_reader(JOB)
New = Callable[..., Publisher]


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url, socket_timeout=1.0) as client:
        yield client


@pytest.fixture
def new(client: redis.Redis) -> New:
    """A publisher of a delivery that stands."""

    def new(token: int = 1, cancel_after_s: float | None = None, clock: Any = None) -> Publisher:
        client.hset(UNACKED, f"t.{token}", "message")
        origin = Origin(JOB, UNACKED, f"t.{token}", token)
        return Publisher(client, KEYS, clock or SystemClock(), origin, cancel_after_s)

    return new


def read(client: redis.Redis, reading: Reading) -> list[Event]:
    entries: Any = client.xrange(STREAM, min=f"({reading.position}")
    return reading.take((text(entry_id), fields) for entry_id, fields in entries)


def texts(client: redis.Redis) -> list[str]:
    entries: Any = client.xrange(STREAM)
    return [Entry.read(fields).text for _, fields in entries]


def test_pieces_that_come_together_are_one_entry_and_nothing_lives_for_ever(client: redis.Redis, new: New) -> None:
    with new() as publisher:
        publisher.write("first")
        wait_until(lambda: texts(client) == ["first"], message="the first piece is not waited with")
        for number in range(100):
            publisher.write(f" {number}")
    written = texts(client)
    assert "".join(written) == "first" + "".join(f" {number}" for number in range(100))
    assert len(written) < 10
    assert 0 < client.ttl(STREAM) <= 120
    reading = Reading()
    read(client, reading)
    assert reading.is_ending


def test_what_is_written_goes_out_though_nothing_more_is_said(client: redis.Redis, new: New) -> None:
    with new() as publisher:
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        publisher.write("b")
        wait_until(lambda: texts(client) == ["a", "b"])


def test_what_comes_after_a_look_at_nothing_waits_for_no_other_look(
    client: redis.Redis, new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "LOOK_S", 0.01)
    publisher, looked = new(), threading.Event()
    look = publisher._script

    def look_and_wait_long(*arguments: Any) -> Any:
        answer = look(*arguments)
        monkeypatch.setattr(publishing, "LOOK_S", 600.0)
        looked.set()
        return answer

    monkeypatch.setattr(publisher, "_script", look_and_wait_long)
    with publisher:
        assert looked.wait(10)
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"], message="it goes out")


def test_a_delivery_that_was_taken_away_writes_nothing_more_and_is_told(client: redis.Redis, new: New) -> None:
    with new() as publisher:
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        client.hdel(UNACKED, "t.1")
        with pytest.raises(StaleCommit):
            wait_until(lambda: publisher.write("b"), message="it is told")
    assert texts(client) == ["a"]


def test_an_earlier_delivery_writes_nothing_once_a_later_one_has(client: redis.Redis, new: New) -> None:
    with new(token=1) as stale, new(token=2) as later:
        stale.write("old")
        wait_until(lambda: texts(client) == ["old"])
        later.write("new")
        wait_until(lambda: texts(client) == ["old", "new"])
        stale.write("older")
    assert [each for each in texts(client) if each] == ["old", "new"]
    reading = Reading()
    assert [type(event) for event in read(client, reading)] == [Chunk, Restarted, Chunk]


def test_an_entry_whose_reply_was_lost_is_written_once(client: redis.Redis, new: New) -> None:
    with new() as publisher:
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        entry = Entry("b", 2, checksum("ab"))
        for _ in range(2):
            publisher._script(publisher._keys, ["t.1", 1, 2, 600, 100, *entry.fields()])
    assert [each for each in texts(client) if each] == ["a", "b"]


def test_what_begins_anew_makes_void_what_was_written_before(client: redis.Redis, new: New) -> None:
    reading = Reading()
    with new() as publisher:
        publisher.begin()
        publisher.write("from one provider")
        wait_until(lambda: texts(client))
        publisher.begin()
        publisher.write("from another")
    events = read(client, reading)
    assert [event.text if isinstance(event, Chunk) else type(event) for event in events] == [
        "from one provider", Restarted, "from another",
    ]  # fmt: skip


def test_text_waits_for_a_reader_and_comes_at_once_when_he_reads(
    client: redis.Redis, new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BATCH_S", 0.0)
    reading, said, seen = Reading(), "", ""
    with new() as publisher:
        for number in range(WINDOW + 50):
            said += f"{number} "
            publisher.write(f"{number} ")
            wait_until(lambda: len(texts(client)) == min(number + 1, WINDOW))  # noqa: B023
        seen = "".join(event.text for event in read(client, reading) if isinstance(event, Chunk))
        client.hset(READER, "read", f"{reading.position} 1")
        wait_until(lambda: len(texts(client)) > WINDOW, message="the reader has caught up")
        seen += "".join(event.text for event in read(client, reading) if isinstance(event, Chunk))
    assert len(texts(client)) <= WINDOW + 2, "what has waited is one entry"
    assert seen == said


def test_nobody_reads_and_the_job_ends_all_the_same(
    client: redis.Redis, new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BATCH_S", 0.0)
    monkeypatch.setattr(publishing, "WINDOW", 3)
    with new() as publisher:
        for number in range(10):
            publisher.write(str(number))
            wait_until(lambda: len(texts(client)) == min(number + 1, 3))  # noqa: B023
    assert texts(client) == ["0", "1", "2", ""], "the rest comes with the result"


def test_a_job_is_cancelled_when_its_reader_has_gone_and_not_before(client: redis.Redis, new: New) -> None:
    clock = ManualClock()
    with new(cancel_after_s=30, clock=clock) as publisher:
        client.hset(READER, "read", "0-0 1")
        wait_until(lambda: publisher._told == b"0-0 1")
        clock.advance(29)
        client.hset(READER, "read", "0-0 2")
        wait_until(lambda: publisher._told == b"0-0 2")
        clock.advance(29)
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        publisher.write("b")
        clock.advance(2)
        with pytest.raises(StreamAbandoned, match="nobody has read for 30 s"):
            wait_until(lambda: publisher.write("c"))


def test_a_reader_can_say_that_he_wants_no_more_though_nothing_was_agreed(client: redis.Redis, new: New) -> None:
    with new() as publisher:
        publisher.write("a")
        client.hset(READER, "gone", 1)
        with pytest.raises(StreamAbandoned, match="wants no more"):
            wait_until(lambda: publisher.write("b"))


def test_an_outage_of_redis_neither_ends_the_job_nor_loses_text(
    client: redis.Redis, new: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "AWAY_S", 0.05)
    clock = ManualClock()
    with new(cancel_after_s=30, clock=clock) as publisher:
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        client.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        publisher.write("b")
        wait_until(lambda: publisher._is_away)
        clock.advance(60)
        publisher.write("c")
        wait_until(lambda: publisher._told_at_s == 60, message="it is tried again")
        client.execute_command("CLIENT", "UNPAUSE")
        wait_until(lambda: "".join(texts(client)) == "abc", message="and what was said meanwhile is written")
        publisher.write("d")
    assert "".join(texts(client)) == "abcd"


def test_an_outage_at_the_end_keeps_the_job_for_no_longer_than_a_try(
    client: redis.Redis, new: New, redis_server: RedisServer
) -> None:
    with new() as publisher:
        publisher.write("a")
        wait_until(lambda: texts(client) == ["a"])
        redis_server.stop()
        publisher.write("b")
    assert not publisher._thread.is_alive()
