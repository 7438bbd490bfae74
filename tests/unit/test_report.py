"""What benchmarks share: marks, rows, profiles, and a result that reads the same after a trip through JSON."""

from __future__ import annotations

import argparse
import io
import json
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.__main__ import names
from benchmarks.report import IN_USE, Benchmark, Mark, Result, Row, markdown, show, shown


@pytest.mark.parametrize(
    ("mark", "reached", "missed"),
    [
        (Mark(at_least=3), 3, 2.99),
        (Mark(at_most=1), 1, 1.01),
        (Mark(above=1), 1.01, 1),
        (Mark(below=100), 99.9, 100),
    ],
)
def test_a_mark_has_its_bound_on_the_right_side(mark: Mark, reached: float, missed: float) -> None:
    assert mark.met_by(reached)
    assert not mark.met_by(missed)
    assert not mark.met_by(float("nan"))


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "below": 2}])
def test_a_mark_without_one_bound_is_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="one of at_least, at_most, above, below"):
        Mark(**bounds)


def test_a_mark_of_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="solo: the mark is of 'ratio', which is None"):
        Row("solo", {"jobs/s": 1}, mark=Mark(at_least=3))
    with pytest.raises(ValueError, match="solo: the mark is of 'p99, µs'"):
        Row("solo", {"jobs/s": 1}, mark=Mark(of="p99, µs", below=3))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A benchmark ends in order when told to; the process that runs these tests does as it did."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    yield Row("fast", {"jobs/s": options.jobs * 1000.5}, ratio=4.0, mark=Mark(at_least=3))
    yield Row("slow", {"jobs/s": 10.25}, ratio=2.0, mark=Mark(at_least=3), reason="it sleeps")
    yield Row("other", {"note": "no mark"})


def benchmark() -> Benchmark:
    made = Benchmark("sample", "How fast a sample is: ``python -m benchmarks.sample``.\n\nMore.")
    made.option("--jobs", short=2, full=20, help="jobs of each turn")
    made.note("A note.")
    return made


def measured(capsys: pytest.CaptureFixture[str], *argv: str) -> Result:
    assert benchmark().run(measure, [*argv, "--json"]) == 0
    return Result.of_json(capsys.readouterr().out)


def test_a_profile_chooses_and_an_option_that_is_given_wins(capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(capsys).options == {"jobs": 2}
    assert measured(capsys, "--full").options == {"jobs": 20}
    assert measured(capsys, "--full", "--jobs", "5").options == {"jobs": 5}


def test_a_result_reads_the_same_from_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(capsys)
    assert Result.of_json(result.as_json()) == result
    assert [row.met for row in result.rows] == [True, False, None]
    assert not result.met
    assert json.loads(result.as_json())["rows"][1]["met"] is False
    assert {"python", "celery", "redis-server", "cluster-tasks"} <= result.versions.keys()


def test_a_machine_that_did_other_work_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(capsys)
    for in_use, is_busy in ((25.0, False), (26.0, True)):
        other = replace(result, machine={**result.machine, IN_USE: in_use})
        assert other.busy is is_busy
        assert ("did other work" in markdown(other)) is is_busy


def test_the_table_says_what_was_missed_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    show(measured(capsys), Console(file=out, width=160))
    said = out.getvalue()
    assert "How fast a sample is" in said
    assert "2,001" in said
    assert "missed: slow: it sleeps" in said
    assert "missed: fast" not in said
    assert "A note." in said


def test_markdown_has_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = markdown(measured(capsys)).splitlines()
    assert "|  | jobs/s | note | ratio | mark |  |" in lines
    assert "| slow | 10.2 |  | 2 | ≥ 3 | missed |" in lines
    assert "| other |  | no mark |  |  |  |" in lines
    assert "missed: slow: it sleeps" in lines


def test_what_a_folder_holds_of_benchmarks_is_run_in_a_known_order() -> None:
    found = names()
    assert found[:2] == ["routing", "throughput"]
    assert {"batching", "cache", "guarantees", "relevance", "retrieval", "shards"} < {*found}
    assert "sample" not in found


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (3.0, "3"), (None, ""), ("a", "a"), (1e400, "inf")],
)
def test_numbers_have_as_many_digits_as_mean_something(value: float | str | None, text: str) -> None:
    assert shown(value) == text
