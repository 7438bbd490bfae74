"""What is written and read quickly is what Celery would have written and read."""

from __future__ import annotations

import math
import uuid
from collections import namedtuple
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from cluster_tasks.broker import plain_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_each_reads_what_the_other_has_written(value: Any) -> None:
    as_ever, quickly = dumps(value), plain_json.written(value)
    assert quickly is not None
    assert loads(quickly) == loads(as_ever)
    assert plain_json.read(as_ever) == plain_json.read(as_ever.encode()) == loads(as_ever)


def test_numbers_that_are_none_are_told_as_ever() -> None:
    text = plain_json.written([math.nan, math.inf, -math.inf])
    assert text is not None
    for found in (loads(text), plain_json.read(text), plain_json.read(dumps([math.nan, math.inf, -math.inf]))):
        assert math.isnan(found[0])
        assert found[1:] == [math.inf, -math.inf]


class Level(IntEnum):
    LOW = 1


Point = namedtuple("Point", "x y")
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 1, 1, tzinfo=UTC), Decimal("1.5"), uuid.UUID(int=1), b"bytes", {1: "one"}, {"a": [{2}]},
        Level.LOW, Point(1, 2), [1.0, object()], [1.0, Decimal("2.5")], [1.0, Fraction(1, 2)], "\ud800", CIRCLE,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_plain_is_celerys_to_write(value: Any) -> None:
    assert plain_json.written(value) is None


@pytest.mark.parametrize(
    "text", [dumps({"at": datetime(2026, 1, 1, tzinfo=UTC)}), '"\\ud800"', "[1", "", b"\x80", b"\x04gz"]
)
def test_what_is_not_plain_is_celerys_to_read(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its text is nobody's
        plain_json.read(text)
