"""Waiting for a condition, the one way tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], within_s: float = 10.0, message: str = "") -> T:
    """Return the first truthy value of ``condition``. Fails the test with ``message`` after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{message or 'the condition'}: not within {within_s:g} s, last seen: {value!r}")
        time.sleep(0.01)
    return value
