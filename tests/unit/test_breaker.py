"""When a breaker opens, whom it lets through, and when it closes: on a manual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster_tasks.breaker import (
    Breaker,
    BreakerPolicy,
    BreakerState,
    Outcome,
    Permit,
    Phase,
    admit,
    news,
    phase_of,
    record,
    wait_s,
)
from cluster_tasks.clock import ManualClock

POLICY = BreakerPolicy(
    failure_threshold=3, success_threshold=2, timeout_s=10.0, window=6, window_s=100.0, probe_lease_s=5.0
)
OUTCOMES = st.sampled_from(Outcome)


def closed_after(outcomes: list[Outcome], policy: BreakerPolicy = POLICY, every_s: float = 1.0) -> BreakerState:
    """The state after calls one after the other, each let through."""
    state = BreakerState()
    for i, outcome in enumerate(outcomes):
        state, permit = admit(state, policy, i * every_s)
        assert permit
        state = record(state, policy, i * every_s, permit, outcome)
    return state


def opened(at_s: float = 0.0) -> BreakerState:
    return BreakerState(generation=1, opened_at_s=at_s)


def test_it_opens_at_the_failure_threshold_and_not_before() -> None:
    assert phase_of(closed_after([Outcome.FAILURE] * 2), POLICY, 2) is Phase.CLOSED
    assert phase_of(closed_after([Outcome.FAILURE] * 3), POLICY, 2) is Phase.OPEN


def test_failures_that_the_window_has_left_behind_do_not_count() -> None:
    many_successes = [Outcome.FAILURE] * 2 + [Outcome.SUCCESS] * 5 + [Outcome.FAILURE] * 2
    assert closed_after(many_successes).opened_at_s is None
    long_ago = closed_after([Outcome.FAILURE] * 3, every_s=POLICY.window_s)
    assert long_ago.opened_at_s is None


def test_below_the_minimum_volume_it_stays_closed() -> None:
    policy = replace(POLICY, minimum_volume=5)
    assert closed_after([Outcome.FAILURE] * 4, policy).opened_at_s is None
    assert closed_after([Outcome.FAILURE] * 5, policy).opened_at_s == 4
    by_a_success = [Outcome.FAILURE] * 4 + [Outcome.SUCCESS]
    assert closed_after(by_a_success, policy).opened_at_s is None


def test_calls_that_were_given_up_count_for_nothing() -> None:
    assert closed_after([Outcome.UNKNOWN] * 50) == BreakerState()


@given(st.floats(0, POLICY.timeout_s, exclude_max=True))
def test_open_it_lets_nothing_through(elapsed_s: float) -> None:
    assert admit(opened(), POLICY, elapsed_s) == (opened(), None)
    assert wait_s(opened(), POLICY, elapsed_s) == POLICY.timeout_s - elapsed_s


def test_half_open_it_lets_as_many_probes_through_as_successes_are_missing() -> None:
    state, first = admit(opened(), POLICY, 10)
    state, second = admit(state, POLICY, 11)
    assert first == Permit(1, 15)
    assert second == Permit(1, 16)
    assert admit(state, POLICY, 12) == (state, None)
    assert wait_s(state, POLICY, 12) == 3
    state = record(state, POLICY, 12, first, Outcome.SUCCESS)
    assert admit(state, POLICY, 12) == (state, None)
    assert record(state, POLICY, 13, second, Outcome.SUCCESS) == BreakerState(generation=2)


def test_a_failure_in_half_open_opens_it_at_once_for_the_whole_timeout() -> None:
    state, first = admit(opened(), POLICY, 10)
    state, second = admit(state, POLICY, 10)
    assert first
    assert second
    state = record(record(state, POLICY, 11, first, Outcome.SUCCESS), POLICY, 12, second, Outcome.FAILURE)
    assert state == BreakerState(generation=2, opened_at_s=12)
    assert phase_of(state, POLICY, 21.9) is Phase.OPEN


def test_probes_that_hang_for_ever_give_way_to_others() -> None:
    state, late_s = opened(), 0
    for probe in range(10):
        late_s = 10 + 5 * probe
        state, first = admit(state, POLICY, late_s)
        state, second = admit(state, POLICY, late_s)
        assert first
        assert second
    for _ in range(POLICY.success_threshold):
        state, permit = admit(state, POLICY, late_s + 5)
        assert permit
        state = record(state, POLICY, late_s + 5, permit, Outcome.SUCCESS)
    assert phase_of(state, POLICY, late_s + 5) is Phase.CLOSED


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.FAILURE])
def test_a_success_threshold_that_was_lowered_meanwhile_lets_one_more_probe_decide(outcome: Outcome) -> None:
    # Two succeeded where three were asked for; now two would do.
    state = replace(opened(), successes=POLICY.success_threshold)
    assert wait_s(state, POLICY, 10) == 0
    state, permit = admit(state, POLICY, 10)
    assert permit
    assert wait_s(state, POLICY, 10) == POLICY.probe_lease_s
    assert admit(state, POLICY, 10) == (state, None)
    told = record(state, POLICY, 11, permit, outcome)
    assert phase_of(told, POLICY, 11) is (Phase.CLOSED if outcome is Outcome.SUCCESS else Phase.OPEN)


def test_a_probe_that_was_given_up_makes_room_at_once() -> None:
    state, _ = admit(opened(), POLICY, 10)
    state, permit = admit(state, POLICY, 10)
    assert permit
    _, another = admit(record(state, POLICY, 11, permit, Outcome.UNKNOWN), POLICY, 11)
    assert another


@given(OUTCOMES)
def test_what_was_let_through_before_it_opened_neither_opens_nor_closes_it(outcome: Outcome) -> None:
    early = Permit(0)
    assert record(opened(), POLICY, 5, early, outcome) == opened()
    half_open, _ = admit(opened(), POLICY, 10)
    assert record(half_open, POLICY, 11, early, outcome) == half_open


def test_opening_and_closing_are_news_and_a_failed_probe_is_not() -> None:
    assert news(BreakerState(), opened()) is Phase.OPEN
    assert news(opened(), BreakerState(generation=2)) is Phase.CLOSED
    assert news(opened(), opened(at_s=10)) is None
    assert news(BreakerState(), BreakerState(calls=((1.0, True),))) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_threshold": 0}, {"success_threshold": 0}, {"timeout_s": 0}, {"window_s": 0}, {"probe_lease_s": 0},
        {"failure_threshold": 7}, {"minimum_volume": 7},
    ],
)  # fmt: skip
def test_a_policy_that_could_never_open_or_close_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(POLICY, **wrong)  # type: ignore[arg-type]


times = st.floats(0, 2e9)


@given(
    st.builds(
        BreakerState,
        generation=st.integers(0),
        opened_at_s=st.none() | times,
        calls=st.lists(st.tuples(times, st.booleans())).map(tuple),
        successes=st.integers(0),
        leases=st.lists(times).map(tuple),
    )
)
def test_a_state_survives_its_text(state: BreakerState) -> None:
    assert BreakerState.from_json(state.to_json()) == state


def test_a_breaker_of_a_process_keeps_its_state_between_calls() -> None:
    clock = ManualClock()
    breaker = Breaker(POLICY, clock)
    for _ in range(3):
        permit = breaker.admit()
        assert permit
        told = breaker.record(permit, Outcome.FAILURE)
    assert (told, breaker.phase, breaker.admit(), breaker.wait_s()) == (Phase.OPEN, Phase.OPEN, None, 10)
    clock.advance(10)
    assert breaker.phase is Phase.HALF_OPEN
    for _ in range(2):
        permit = breaker.admit()
        assert permit
        told = breaker.record(permit, Outcome.SUCCESS)
    assert (told, breaker.phase, breaker.wait_s()) == (Phase.CLOSED, Phase.CLOSED, 0)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Calls begin, end, hang and come late in any order: no order wedges it or lets too much through."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.now_s = BreakerState(), 0.0
        self.out: list[Permit] = []

    @rule(seconds=st.floats(0.1, 20))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def a_call_asks(self) -> None:
        promised_s = wait_s(self.state, POLICY, self.now_s)
        before = phase_of(self.state, POLICY, self.now_s)
        self.state, permit = admit(self.state, POLICY, self.now_s)
        assert (permit is not None) == (promised_s <= 0)
        assert phase_of(self.state, POLICY, self.now_s) is before
        if permit:
            assert (permit.lease_until_s is None) == (before is Phase.CLOSED)
            self.out.append(permit)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=OUTCOMES)
    def a_call_ends(self, data: st.DataObject, outcome: Outcome) -> None:
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.state
        self.state = record(before, POLICY, self.now_s, permit, outcome)
        if news(before, self.state) is Phase.OPEN:
            assert outcome is Outcome.FAILURE
        if news(before, self.state) is Phase.CLOSED:
            assert outcome is Outcome.SUCCESS
        if before.opened_at_s is not None and permit.generation == before.generation and outcome is Outcome.FAILURE:
            assert self.state.opened_at_s == self.now_s

    @invariant()
    def what_it_remembers_is_bounded(self) -> None:
        assert len(self.state.calls) <= POLICY.window
        assert len(self.state.leases) <= POLICY.success_threshold
        assert self.state.successes < POLICY.success_threshold

    @invariant()
    def patience_always_helps(self) -> None:
        patient_s = self.now_s + POLICY.timeout_s + POLICY.probe_lease_s
        _, permit = admit(self.state, POLICY, patient_s)
        assert permit


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
