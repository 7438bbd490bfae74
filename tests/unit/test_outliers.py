"""Which nodes do their jobs worse than the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster_tasks.failover.outliers import MIN_JOBS, Record, find_outliers, is_slow, others_fail
from cluster_tasks.model import Recent

SLOW = 10.0


def node(
    node_id: str, jobs: int = 50, failures: int = 0, latency_s: float = 1.0, task: str = "chat",
    sure_latency_s: float | None = None,
) -> Record:  # fmt: skip
    sure_s = latency_s if sure_latency_s is None else sure_latency_s
    return Record(node_id, {task: Recent(jobs=jobs, failures=failures, latency_s=latency_s, sure_latency_s=sure_s)})


def named(*records: Record, slow_factor: float = SLOW) -> list[str]:
    return [outlier.node_id for outlier in find_outliers(records, slow_factor)]


def recents(failures: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Recent]:
    """Any report; ``failures`` is drawn from as the share that failed."""
    return st.builds(
        lambda jobs, share, latency_s: Recent(
            jobs=jobs, failures=round(jobs * share), latency_s=latency_s, sure_latency_s=latency_s
        ),
        st.integers(0, 100), failures or st.floats(0, 1), st.floats(0, 100),
    )  # fmt: skip


RECORDS = st.lists(st.dictionaries(st.sampled_from(["chat", "ocr"]), recents()), min_size=1, max_size=6).map(
    lambda drawn: [Record(f"n{number}", recent) for number, recent in enumerate(drawn)]
)


def test_a_node_whose_jobs_fail_is_named_where_those_of_others_do_not() -> None:
    assert named(node("a", failures=40), node("b"), node("c")) == ["a"]
    (outlier,) = find_outliers([node("a", failures=40), node("b"), node("c")], SLOW)
    assert outlier.reason == "40 of its last 50 runs of chat failed, and not on others"


def test_a_node_that_takes_ten_times_as_long_as_the_others_is_named() -> None:
    assert named(node("a", latency_s=10), node("b"), node("c")) == ["a"]
    assert named(node("a", latency_s=9.9), node("b"), node("c")) == []
    assert named(node("a", latency_s=100), node("b"), node("c"), slow_factor=0) == []


def test_a_node_that_may_have_met_long_jobs_by_chance_is_not_slow() -> None:
    assert named(node("a", latency_s=30, sure_latency_s=0.1), node("b"), node("c")) == []


def test_a_hiccup_of_milliseconds_is_not_slow() -> None:
    assert named(node("a", latency_s=0.04), node("b", latency_s=0.001), node("c", latency_s=0.001)) == []


@given(recents(), st.integers(2, 6))
def test_where_all_do_alike_the_fault_is_in_the_jobs(recent: Recent, count: int) -> None:
    assert named(*(Record(f"n{number}", {"chat": recent}) for number in range(count))) == []


@given(RECORDS)
def test_nobody_is_named_by_few_jobs_or_for_a_task_that_no_other_runs(records: list[Record]) -> None:
    for outlier in find_outliers(records, SLOW):
        mine = next(record for record in records if record.node_id == outlier.node_id).recent
        peers = [record.recent for record in records if record.node_id != outlier.node_id]
        assert any(
            recent.jobs >= MIN_JOBS and any(task in peer and peer[task].jobs >= MIN_JOBS for peer in peers)
            for task, recent in mine.items()
        )


@given(RECORDS)
def test_the_order_in_which_nodes_are_told_of_does_not_matter(records: list[Record]) -> None:
    assert find_outliers(records, SLOW) == find_outliers(records[::-1], SLOW)


@given(st.integers(3, 9), st.data())
def test_fewer_than_half_that_fail_cannot_hide_each_other(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(1, (count - 1) // 2))
    records = [node(f"n{number}", failures=50 if number < bad else 0) for number in range(count)]
    assert sorted(named(*records)) == [f"n{number}" for number in range(bad)]


def test_the_worst_is_named_first() -> None:
    nodes = [node("slow", latency_s=20), node("fails", failures=35), node("worse", failures=50)]
    assert named(*nodes, *(node(f"n{number}") for number in range(4))) == ["worse", "fails", "slow"]


@pytest.mark.parametrize("failures", [10, 20, 24])
def test_a_node_that_fails_more_than_others_by_chance_stays(failures: int) -> None:
    assert named(node("a", failures=failures), node("b"), node("c")) == []
    assert named(node("a", jobs=10, failures=7), node("b", jobs=10, failures=2)) == []


def test_of_two_nodes_the_one_that_fails_is_named() -> None:
    assert named(node("a", failures=50), node("b")) == ["a"]


def test_a_probe_is_slow_by_the_same_measure_whatever_their_number() -> None:
    others = [node("b"), node("c")]
    assert is_slow(node("a", jobs=1, latency_s=11).recent, others, SLOW)
    assert not is_slow(node("a", jobs=1, latency_s=2).recent, others, SLOW)
    assert not is_slow(node("a", jobs=1, latency_s=11).recent, [], SLOW)


def test_a_failed_probe_says_nothing_where_half_of_the_jobs_of_others_fail() -> None:
    failed = node("a", jobs=1, failures=1).recent
    assert others_fail(failed, [node("b", failures=25), node("c", failures=50)])
    assert not others_fail(failed, [node("b"), node("c", failures=50), node("d")])
    assert not others_fail(failed, [])


def test_of_peers_that_fail_alike_the_one_that_is_less_sure_is_compared_with_in_any_order() -> None:
    records = [
        Record(name, {"chat": Recent(jobs=jobs, failures=failures, latency_s=0.0, sure_latency_s=0.0)})
        for name, jobs, failures in (("n0", 10, 0), ("n1", 10, 8), ("n2", 14, 0))
    ]
    assert find_outliers(records, SLOW) == find_outliers(records[::-1], SLOW) == []
