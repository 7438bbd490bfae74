"""What a cache is made of, taken alone: how entries are written down, patterns, and the memory of a process."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.cache.counters import Counters
from cluster_tasks.cache.entry import Entry, pack, unpack
from cluster_tasks.cache.flight import is_due
from cluster_tasks.cache.local import OVERHEAD_BYTES, LocalCache, Memory
from cluster_tasks.cache.patterns import beginning, compile_pattern, escape
from cluster_tasks.clock import ManualClock

GENERATION = "0123456789abcdef"


def memory_of(clock: ManualClock | None = None, **bounds: int) -> tuple[Memory, Counters]:
    counters = Counters()
    return Memory(clock or ManualClock(), counters, **bounds), counters


def an_entry(value: bytes | None = b"v", ttl_s: float = 60.0, kept_s: float = 0.0) -> Entry:
    return Entry(value, ttl_s, ttl_s, kept_s)


# How entries are written down.


@given(
    key=st.binary(min_size=1), value=st.none() | st.binary(), ttl_ms=st.integers(1, 10**12),
    kept_ms=st.integers(0, 10**12), cost_us=st.integers(0, 10**12), left_ms=st.integers(0, 10**12),
)  # fmt: skip
def test_an_entry_is_read_as_it_was_written(
    key: bytes, value: bytes | None, ttl_ms: int, kept_ms: int, cost_us: int, left_ms: int
) -> None:
    entry = Entry(value, ttl_ms / 1e3, 0.0, kept_ms / 1e3, cost_us / 1e6, GENERATION)
    found = unpack(key, pack(key, entry), (kept_ms + left_ms) / 1e3)
    assert found is not None
    assert (found.value, found.generation) == (value, GENERATION)
    assert (found.ttl_s, found.kept_s, found.cost_s) == pytest.approx((entry.ttl_s, entry.kept_s, entry.cost_s))
    assert found.left_s == pytest.approx(left_ms / 1e3, abs=1e-3)


@given(value=st.binary(max_size=40), data=st.data())
def test_no_damage_goes_unnoticed(value: bytes, data: st.DataObject) -> None:
    packed = pack(b"key", an_entry(value))
    damages = ["cut", "grown", "changed", "other key"]
    damage, key = data.draw(st.sampled_from(damages)), b"key"
    if damage == "cut":
        damaged = packed[: data.draw(st.integers(0, len(packed) - 1))]
    elif damage == "grown":
        damaged = packed + data.draw(st.binary(min_size=1, max_size=4))
    elif damage == "changed":
        at, bit = data.draw(st.integers(0, len(packed) - 1)), data.draw(st.integers(0, 7))
        damaged = packed[:at] + bytes([packed[at] ^ 1 << bit]) + packed[at + 1 :]
    else:
        damaged, key = packed, b"yek"
    assert unpack(key, damaged, 60.0) is None


@given(st.binary(max_size=200))
def test_what_somebody_else_wrote_is_nothing(foreign: bytes) -> None:
    assert unpack(b"key", foreign, 60.0) is None


def test_an_entry_is_fresh_for_its_ttl_and_then_kept() -> None:
    entry = an_entry(ttl_s=10.0, kept_s=5.0)
    assert (entry.after(9.9).is_fresh, entry.after(10.0).is_fresh) == (True, False)
    assert entry.after(4.0).age_s == 4.0
    stale = unpack(b"k", pack(b"k", entry), 3.0)
    assert stale is not None
    assert (stale.is_fresh, stale.left_s, stale.age_s) == (False, -2.0, 12.0)


def test_what_costs_much_is_computed_anew_the_sooner() -> None:
    random.seed(1)
    entries = {cost_s: Entry(b"", 60.0, 2.0, cost_s=cost_s) for cost_s in (0.0, 0.1, 2.0, 60.0)}
    due = {cost_s: sum(is_due(entry) for _ in range(2_000)) / 2_000 for cost_s, entry in entries.items()}
    # P(-cost ln U >= left) = exp(-left / cost).
    assert (due[0.0], due[0.1]) == (0.0, 0.0)
    assert due[2.0] == pytest.approx(0.368, abs=0.05)
    assert due[60.0] == pytest.approx(0.967, abs=0.03)
    assert is_due(Entry(b"", 60.0, 0.0))


# Patterns.


@given(st.text(max_size=20))
def test_an_escaped_text_matches_itself(text: str) -> None:
    assert compile_pattern(escape(text)).fullmatch(text)
    assert beginning(escape(text)) in text


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*", ["", "a", "a\nb"], []),
        ("h?llo", ["hello", "h\nllo"], ["hllo", "heello"]),
        ("h[ae]llo", ["hello", "hallo"], ["hillo", "h[ae]llo"]),
        ("h[^e]llo", ["hallo", "h^llo"], ["hello"]),
        ("h[a-c]llo", ["hallo", "hbllo"], ["hdllo", "h-llo"]),
        ("h[c-a]llo", ["hallo", "hbllo"], ["hdllo"]),
        ("h[a-]llo", ["hallo", "h-llo"], ["hbllo"]),
        (r"h[\]\-]llo", ["h]llo", "h-llo"], ["h\\llo"]),
        (r"\*\?\[", ["*?["], ["***"]),
        ("[]x", [], ["x", "]x"]),
        ("[^]x", ["ax", "\nx"], ["x"]),
        ("(a|b).", ["(a|b)."], ["ax", "(a|b)x"]),
    ],
)
def test_a_pattern_matches_as_in_redis(pattern: str, matching: list[str], others: list[str]) -> None:
    matches = compile_pattern(pattern).fullmatch
    assert [text for text in [*matching, *others] if matches(text)] == matching
    assert all(text.startswith(beginning(pattern)) for text in matching)


def reference(pattern: str, text: str) -> bool:
    """Whether a pattern of stars, question marks and letters matches, by what the words say."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(reference(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and reference(pattern[1:], text[1:])


@given(st.text("ab*?", max_size=7), st.text("ab", max_size=7))
def test_stars_match_as_their_words_say(pattern: str, text: str) -> None:
    assert bool(compile_pattern(pattern).fullmatch(text)) == reference(pattern, text)


def test_many_stars_take_no_longer_than_a_look_at_the_key() -> None:
    # One that tries again what cannot fit would not end within the life of the machine.
    for pattern in ("*a" * 20 + "*b", "*" * 500 + "b", "*[a-z]?" * 20 + "b"):
        matches = compile_pattern(pattern).fullmatch
        assert not matches("a" * 1_024)
        assert matches("a" * 1_024 + "b")


@pytest.mark.parametrize("pattern", ["[", "[a", "[^", r"[a\]", "a\\"])
def test_a_pattern_that_ends_too_early_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        compile_pattern(pattern)


# The memory of a process.


def test_the_least_recently_used_goes_when_there_are_too_many() -> None:
    memory, counters = memory_of(max_entries=2)
    for key in "ab":
        memory.put("n", key, an_entry())
    memory.get("n", "a")
    memory.put("n", "c", an_entry())
    assert [memory.get("n", key) is not None for key in "abc"] == [True, False, True]
    assert counters.take() == {"local.evictions": 1}


def test_the_bytes_of_all_namespaces_are_bounded() -> None:
    room = 3 * (OVERHEAD_BYTES + 102)
    memory, counters = memory_of(max_bytes=room)
    for name in "abcd":
        assert memory.put(name, "k", an_entry(b"x" * 100))
    assert (len(memory), memory.bytes) == (3, room)
    assert memory.get("a", "k") is None
    # One that fills all the room drives the others out; one that is larger leaves them alone.
    assert memory.put("e", "k", an_entry(b"x" * (room - OVERHEAD_BYTES - 2)))
    assert (len(memory), counters.take()["local.evictions"]) == (1, 4)
    assert not memory.put("f", "k", an_entry(b"x" * room))
    assert memory.get("e", "k") is not None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("kl"), st.integers(0, 900), st.booleans())))
def test_the_books_of_a_memory_are_right(steps: list[tuple[str, str, int, bool]]) -> None:
    memory, _ = memory_of(max_entries=4, max_bytes=2_000)
    for name, key, size, forgets in steps:
        if forgets:
            memory.forget(name, [key])
        else:
            memory.put(name, key, an_entry(b"x" * size))
        sizes = [OVERHEAD_BYTES + 2 + len(memory.get(*place).value or b"") for place in memory.places("")]  # type: ignore[union-attr]
        assert memory.bytes == sum(sizes) <= 2_000
        assert sorted(place for name in "abc" for place in memory.places(name)) == sorted(memory.places(""))
        assert len(memory) == len(sizes) <= 4


@pytest.mark.parametrize("size", [10, 1_000, 6_200])
def test_a_memory_takes_about_as_much_as_it_counts(size: int) -> None:
    memory, _ = memory_of(max_entries=100_000)
    tracemalloc.start()
    try:
        for number in range(5_000):
            # Nothing of an entry is shared with others, as of one that was read.
            entry = Entry(bytes(size), number + 0.5, number + 0.25, number + 0.75, number + 0.125, f"{number:016x}")
            memory.put("embeddings", f"{number:064d}", entry)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(memory) == 5_000
    assert memory.bytes == pytest.approx(taken, rel=0.15)


def test_what_others_do_with_their_namespaces_takes_no_memory() -> None:
    memory, _ = memory_of()
    tracemalloc.start()
    try:
        for number in range(5_000):
            memory.forget(f"tenant{number}/reports", ["k"])
            memory.forget(f"search.{number}", None)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # Ten thousand names would take over a megabyte; what else runs in the process takes a little.
    assert taken < 400_000


def test_what_takes_the_place_of_a_larger_value_gives_room_back() -> None:
    memory, _ = memory_of()
    memory.put("n", "k", an_entry(b"x" * 1_000))
    memory.put("n", "k", an_entry(None))
    assert memory.bytes == OVERHEAD_BYTES + 2
    memory.forget("", None)
    assert (len(memory), memory.bytes) == (0, 0)


def test_a_value_too_large_to_be_kept_drives_out_the_older_one_of_its_key() -> None:
    cache = LocalCache(memory_of(max_bytes=1_000)[0])
    assert cache.set("k", b"old")
    assert not cache.set("k", b"x" * 1_000)
    assert cache.get("k") is None


def test_an_entry_goes_when_it_is_kept_no_longer() -> None:
    clock = ManualClock()
    memory, _ = memory_of(clock)
    memory.put("n", "k", an_entry(ttl_s=10.0, kept_s=5.0))
    clock.advance(12.0)
    found = memory.get("n", "k")
    assert found is not None
    assert (found.is_fresh, found.left_s) == (False, -2.0)
    clock.advance(3.0)
    assert memory.get("n", "k") is None
    assert memory.bytes == 0


def test_what_was_read_before_something_was_forgotten_is_not_put() -> None:
    memory, _ = memory_of()
    era = memory.era("n")
    memory.forget("n", ["other"])
    assert not memory.put("n", "k", an_entry(), era)
    assert memory.put("n", "k", an_entry(), memory.era("n"))
    era = memory.era("n")
    memory.forget("", None)
    assert not memory.put("n", "k", an_entry(), era)


@pytest.mark.parametrize("bounds", [{"max_entries": 0}, {"max_bytes": 0}])
def test_a_memory_without_room_is_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bounds))}=0"):
        memory_of(**bounds)


def test_an_entry_ages_from_when_it_was_asked_for_and_is_kept_no_longer_than_it_may() -> None:
    clock = ManualClock()
    memory, _ = memory_of(clock)
    asked_at_s = clock.monotonic()
    clock.advance(10.0)
    memory.put("n", "k", an_entry(ttl_s=60.0), as_of_s=asked_at_s, for_s=30.0)
    found = memory.get("n", "k")
    assert found is not None
    assert (found.ttl_s, found.left_s) == (60.0, 50.0)
    clock.advance(20.0)
    assert memory.get("n", "k") is None


def test_a_lease_that_has_run_out_is_anybody_s() -> None:
    clock = ManualClock()
    cache = LocalCache(memory_of(clock)[0])
    mine = cache.lease(["k"], 3.0)
    assert mine.keys() == {"k"}
    assert cache.lease(["k", "l"], 3.0).keys() == {"l"}
    clock.advance(3.0)
    others = cache.lease(["k"], 3.0)
    assert others.keys() == {"k"}
    assert others != mine
    assert not cache.hold(mine, 3.0)
    assert not cache.commit(mine, {"k": an_entry()})
    assert cache.get("k") is None
