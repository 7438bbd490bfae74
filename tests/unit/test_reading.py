"""What a reader makes of the stream of a job: the texts of two attempts are never joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.streaming.entries import Entry, checksum
from cluster_tasks.streaming.reading import END, Chunk, Event, Reading, Restarted

Written = list[tuple[str, Mapping[bytes, bytes]]]


def attempt(token: int, pieces: Sequence[str], *, ends: bool = False) -> Written:
    """The entries of one delivery."""
    written, so_far = [], ""
    for number, piece in enumerate(pieces, start=1):
        so_far += piece
        entry = Entry(piece, len(so_far), checksum(so_far), ends and number == len(pieces))
        written.append((f"{token}-{number}", as_read(entry)))
    return written


def as_read(entry: Entry) -> Mapping[bytes, bytes]:
    fields = [field if isinstance(field, bytes) else field.encode() for field in entry.fields()]
    return dict(zip(fields[::2], fields[1::2], strict=True))


def shown(events: Sequence[Event], before: str = "") -> str:
    """What somebody sees who shows what comes, and clears it at a restart."""
    for event in events:
        before = "" if isinstance(event, Restarted) else before + event.text if isinstance(event, Chunk) else before
    return before


def kinds(events: Sequence[Event]) -> list[Any]:
    return [event.text if isinstance(event, Chunk) else type(event) for event in events]


def test_pieces_come_as_they_were_written_and_the_rest_with_the_result() -> None:
    reading = Reading()
    assert kinds(reading.take(attempt(1, ["a", "b"]))) == ["a", "b"]
    assert reading.finish("abc") == [Chunk("c", END)]


def test_a_second_attempt_makes_void_what_was_read() -> None:
    reading = Reading()
    events = reading.take([*attempt(1, ["old ", "words"]), *attempt(2, ["new "])])
    assert kinds(events) == ["old ", "words", Restarted, "new "]
    assert kinds(reading.finish("new words")) == ["words"]


def test_a_second_attempt_of_which_nothing_was_shown_before_is_no_restart() -> None:
    reading = Reading()
    assert kinds(reading.take([("1-1", as_read(Entry(is_last=True))), *attempt(2, ["new"])])) == ["new"]


def test_a_result_of_another_text_makes_void_what_was_read() -> None:
    reading = Reading()
    reading.take(attempt(1, ["old ", "words"]))
    assert kinds(reading.finish("old ideas")) == [Restarted, "old ideas"]
    reading = Reading()
    reading.take(attempt(1, ["longer than it"]))
    assert kinds(reading.finish("longer")) == [Restarted, "longer"]


def test_a_result_without_text_adds_nothing() -> None:
    reading = Reading()
    reading.take(attempt(1, ["a"]))
    assert reading.finish(None) == []


def test_what_does_not_continue_is_not_shown() -> None:
    reading = Reading()
    first, _, third = attempt(1, ["a", "b", "c"])
    assert kinds(reading.take([first, third])) == ["a"]
    assert kinds(reading.finish("abc")) == [Restarted, "abc"]


def test_a_stream_whose_beginning_is_gone_waits_for_the_result() -> None:
    reading = Reading()
    assert reading.take(attempt(1, ["a", "b", "c"])[1:]) == []
    assert kinds(reading.finish("abc")) == ["abc"], "nothing was shown that could be void"


def test_the_end_of_an_attempt_is_told_until_another_begins() -> None:
    reading = Reading()
    reading.take(attempt(1, ["a"], ends=True))
    assert reading.is_ending
    reading.take(attempt(2, ["b"]))
    assert not reading.is_ending


def test_who_goes_on_is_told_that_what_he_has_is_void() -> None:
    reading = Reading("1-2")
    assert reading.position == "1-1"
    assert kinds(reading.take([*attempt(1, ["a", "b"])[1:], *attempt(2, ["c"])])) == [Restarted, "c"]
    late = Reading("1-2")
    assert kinds(late.finish("whole")) == [Restarted, "whole"], "nothing is known of where he was"
    assert Reading(END).finish("whole") == [], "he has it all"


@pytest.mark.parametrize("after", ["x", "1", "1-", "-1-2", "1-2\n", "1-2-3", "9" * 30 + "-1"])
def test_an_id_that_is_none_is_refused(after: str) -> None:
    with pytest.raises(ValueError, match="expected the id of one of its chunks"):
        Reading(after)


def test_half_a_character_comes_through() -> None:
    reading = Reading()
    assert kinds(reading.take(attempt(1, ["\ud83d", "\ude00"]))) == ["\ud83d", "\ude00"]
    assert reading.finish("\ud83d\ude00") == []


PIECES = st.lists(st.text("ab", min_size=1, max_size=3), max_size=5)


@given(st.lists(PIECES, min_size=1, max_size=4), st.data())
def test_whatever_is_lost_and_whenever_one_goes_on_the_end_is_the_text_of_the_result(
    attempts: list[list[str]], data: st.DataObject
) -> None:
    written = [entry for token, pieces in enumerate(attempts, start=1) for entry in attempt(token, pieces)]
    result = "".join(attempts[-1]) + data.draw(st.text("ab", max_size=3))
    lost = data.draw(st.sets(st.sampled_from([entry_id for entry_id, _ in written]))) if written else set()
    stream = [(entry_id, fields) for entry_id, fields in written if entry_id not in lost]
    seen, last_id, reading = "", "", Reading()
    for entry in stream:
        if data.draw(st.booleans()):
            # Somebody else goes on, who knows what was shown; or the stream is gone by then.
            reading = Reading(last_id)
            again = [] if data.draw(st.booleans()) else stream[: stream.index(entry)]
            seen = shown(reading.take([each for each in again if _after(each[0], reading.position)]), seen)
        events = reading.take([entry] if _after(entry[0], reading.position) else [])
        seen = shown(events, seen)
        last_id = next((event.id for event in reversed(events) if isinstance(event, Chunk)), last_id)
        assert any("".join(pieces).startswith(seen) for pieces in [*attempts, [result]]), "of one attempt"
    assert shown(reading.finish(result), seen) == result


def _after(entry_id: str, position: str) -> bool:
    number, place = ([int(part) for part in each.split("-")] for each in (entry_id, position))
    return number > place
