"""Who is dead, by beat counters on a manual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.clock import ManualClock
from cluster_tasks.failover.detector import Detector

LEASE_S, CHECK_S = 3.0, 0.5


def observe(detector: Detector, clock: ManualClock, beats: dict[str, int], for_s: float) -> list[str]:
    """Observe unchanged counters for a while; return whom the last look names."""
    named: list[str] = []
    for _ in range(int(for_s / CHECK_S) + 1):
        named = [silent.node_id for silent in detector.observe({n: Beat("1", count) for n, count in beats.items()})]
        clock.advance(CHECK_S)
    return named


def test_a_silent_node_is_named_after_a_lease_and_not_before() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    assert observe(detector, clock, {"a": 1}, LEASE_S - CHECK_S) == []
    assert observe(detector, clock, {"a": 1}, 0) == ["a"]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_node_that_beats_within_its_lease_is_never_named(beats: list[bool]) -> None:
    clock = ManualClock()
    detector, count, still_s = Detector(clock, LEASE_S), 0, 0.0
    for look, beat in enumerate(beats):
        # What it saw first may be any age.
        still_s = 0.0 if beat or not look else still_s + CHECK_S
        count += beat
        named = detector.observe({"a": Beat("1", count)})
        assert bool(named) == (still_s >= LEASE_S)
        clock.advance(CHECK_S)


def test_a_new_epoch_is_a_new_life() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    observe(detector, clock, {"a": 1}, LEASE_S - CHECK_S)
    assert detector.observe({"a": Beat("2", 1)}) == []


def test_an_observer_that_slept_starts_anew() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    observe(detector, clock, {"a": 1}, CHECK_S)
    clock.advance(LEASE_S)
    assert observe(detector, clock, {"a": 1}, LEASE_S - CHECK_S) == []
    assert observe(detector, clock, {"a": 1}, 0) == ["a"]


def test_an_observer_that_could_not_see_starts_anew() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    observe(detector, clock, {"a": 1}, LEASE_S - CHECK_S)
    detector.interrupted()
    assert observe(detector, clock, {"a": 1}, LEASE_S - CHECK_S) == []


def test_after_an_outage_everyone_gets_the_time_to_notice_that_it_is_over() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S, outage_s=8.0)
    observe(detector, clock, {"a": 1, "b": 1}, 1)
    detector.interrupted()
    assert observe(detector, clock, {"a": 1, "b": 1}, 8.0 + LEASE_S - CHECK_S) == []
    assert observe(detector, clock, {"a": 1, "b": 2}, 0) == ["a"]
    # From then on, what beats is watched as ever.
    assert observe(detector, clock, {"b": 3}, LEASE_S - CHECK_S) == []
    assert observe(detector, clock, {"b": 3}, 0) == ["b"]


def test_when_most_nodes_stand_still_they_are_given_one_more_lease() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    beats = {"a": 1, "b": 1, "c": 1}
    assert observe(detector, clock, beats, 2 * LEASE_S - CHECK_S) == []
    assert observe(detector, clock, beats, 0) == ["a", "b", "c"]


def test_the_failure_threshold_counts_looks_that_found_no_beat() -> None:
    clock = ManualClock()
    detector = Detector(clock, lease_s=1.2, failure_threshold=5)
    assert observe(detector, clock, {"a": 1}, 4 * CHECK_S) == []
    assert observe(detector, clock, {"a": 1}, 0) == ["a"]


def test_it_says_how_many_nodes_the_guard_gives_more_time() -> None:
    clock = ManualClock()
    detector = Detector(clock, LEASE_S)
    beats = {"a": 1, "b": 1, "c": 1}
    assert (observe(detector, clock, beats, LEASE_S - CHECK_S), detector.held_back) == ([], 0)
    assert (observe(detector, clock, beats, LEASE_S - CHECK_S), detector.held_back) == ([], 3)
    assert (observe(detector, clock, beats, 0), detector.held_back) == (["a", "b", "c"], 0)
