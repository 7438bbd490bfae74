"""The lists of a cluster, seen from below."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.broker import Broker


@pytest.fixture
def broker(redis_url: str) -> Iterator[Broker]:
    """Those of an empty cluster."""
    made = Broker(redis_url)
    yield made
    made.close()
