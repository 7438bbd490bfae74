"""What the cluster speaks of."""

from __future__ import annotations

import pytest

from cluster_tasks.model import Node


@pytest.mark.parametrize(
    ("limit", "accepted"),
    [("", True), ("ramping", True)]
    + [(limit, False) for limit in ("recovering", "ejected", "half-open", "probing", "of a newer release")],
)
def test_a_limit_but_that_of_the_ramp_keeps_jobs_from_a_node(limit: str, accepted: bool) -> None:
    assert Node(id="a", serves=frozenset({"llm"}), limit=limit).accepts("llm") is accepted
