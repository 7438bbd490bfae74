"""What a node remembers of its last jobs."""

from __future__ import annotations

import random

from cluster_tasks.clock import ManualClock
from cluster_tasks.model import Recent
from workers.load import ALARMING, RECENT, RECENT_S, Outcomes


def test_runs_are_summed_up_by_task_with_the_median_time_of_those_that_succeeded() -> None:
    outcomes = Outcomes()
    for seconds in (1.0, 2.0, 30.0):
        outcomes.record_run("chat", True, seconds, "")
    outcomes.record_run("chat", False, 0.1, "")
    outcomes.record_run("ocr", False, 0.1, "")
    assert outcomes.recent("") == {
        "chat": Recent(jobs=4, failures=1, latency_s=2.0),
        "ocr": Recent(jobs=1, failures=1),
    }


def test_the_median_of_few_runs_is_sure_of_little() -> None:
    def of(seconds: list[float]) -> Recent:
        outcomes = Outcomes()
        for each in seconds:
            outcomes.record_run("chat", True, each, "")
        return outcomes.recent("")["chat"]

    assert of([5.0] * 16).sure_latency_s == 0
    assert of([5.0] * 17).sure_latency_s == 5
    # Of a hundred runs 30 are four standard deviations below half.
    assert of([0.1] * 31 + [5.0] * 69).sure_latency_s == 0.1
    assert of([0.1] * 30 + [5.0] * 70).sure_latency_s == 5


def test_jobs_that_are_short_or_long_by_chance_make_no_node_slow() -> None:
    rng = random.Random(1)
    sure = Outcomes()
    for _ in range(2_000):
        sure.record_run("chat", True, rng.choice((0.001, 1.0)), "")
        assert sure.recent("")["chat"].sure_latency_s in (0, 0.001)


def test_old_runs_are_forgotten_by_number_and_by_age() -> None:
    clock = ManualClock()
    outcomes = Outcomes(clock.monotonic)
    for _ in range(RECENT + 10):
        outcomes.record_run("chat", True, 1.0, "")
    assert outcomes.recent("")["chat"].jobs == RECENT
    clock.advance(RECENT_S + 1)
    assert outcomes.recent("") == {}


def test_a_new_trial_starts_from_nothing() -> None:
    outcomes = Outcomes()
    outcomes.record_run("chat", False, 1.0, "")
    assert outcomes.recent("x1") == {}
    outcomes.record_run("chat", True, 1.0, "x1")
    assert outcomes.recent("x1")["chat"] == Recent(jobs=1, latency_s=1.0)
    assert outcomes.recent("") == {}


def test_many_failures_in_a_row_raise_an_alarm_and_a_success_begins_anew() -> None:
    outcomes, alarms = Outcomes(), []
    outcomes.alarm = lambda: alarms.append(1)
    for _ in range(ALARMING - 1):
        outcomes.record_run("chat", False, 1.0, "")
    outcomes.record_run("chat", True, 1.0, "")
    for _ in range(ALARMING - 1):
        outcomes.record_run("chat", False, 1.0, "")
    assert not alarms
    outcomes.record_run("chat", False, 1.0, "")
    assert len(alarms) == 1
