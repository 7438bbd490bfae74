"""How the notes of jobs become a rate, and what is said of a peer."""

from __future__ import annotations

import pytest

from benchmarks.peers.contestants import PEERS, PREFORK
from benchmarks.throughput import jobs_per_s, peer_row


def notes(process: int, first_s: float, last_s: float, count: int) -> list[tuple[float, int]]:
    step_s = (last_s - first_s) / (count - 1)
    return [(first_s + number * step_s, process) for number in range(count)]


def test_the_rate_of_one_process_is_that_between_its_first_job_and_its_last() -> None:
    assert jobs_per_s(notes(0, 5.0, 15.0, 1001), 1) == pytest.approx(100)


def test_of_two_processes_only_the_time_counts_in_which_both_were_at_work() -> None:
    alone_before_and_after = notes(0, 0.0, 20.0, 2001) + notes(1, 5.0, 15.0, 1001)
    assert jobs_per_s(alone_before_and_after, 2) == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize("second", [[], notes(1, 9.95, 10.0, 2)], ids=["idle", "late"])
def test_a_run_that_is_too_short_for_both_is_no_figure(second: list[tuple[float, int]]) -> None:
    with pytest.raises(RuntimeError, match="give more --jobs"):
        jobs_per_s(notes(0, 0.0, 10.0, 1001) + second, 2)


def test_only_who_runs_the_jobs_of_a_dead_worker_again_is_a_mark() -> None:
    marked = {peer.name: peer_row("here", peer, [{"cluster": 2.0, "stock": 1.5, peer.name: 1.0}]).met for peer in PEERS}
    assert marked == {"dramatiq": True, "rq": True, "arq": True, "taskiq": True, "huey": None, "saq": True}
    assert all(peer.version and PREFORK in peer.workers for peer in PEERS)
