"""What a sender sees of the nodes, whatever becomes of the registry."""

from __future__ import annotations

import logging

import pytest

from cluster_tasks import router
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ConfigurationError
from cluster_tasks.model import Node
from cluster_tasks.router import ClusterView
from tests.waiting import wait_until


class Registry:
    """Raises what it is told to, until it is told otherwise."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def list(self) -> list[Node]:
        if self.error:
            raise self.error
        return [Node(id="a", serves=frozenset({"llm"}))]


@pytest.mark.parametrize("error", [ConfigurationError("consul is not installed"), KeyError("of a bug")], ids=repr)
def test_a_registry_that_cannot_be_read_at_all_holds_up_no_sender_and_is_seen_once_it_can(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(error)
    view = ClusterView(registry.list, SystemClock(), snapshot_s=0.02)
    assert view.nodes() == ()
    # Who waits for it again comes to no end.
    monkeypatch.setattr(router, "WORTH_WAITING_S", 1e6)
    assert view.nodes() == ()
    assert not view.answers
    registry.error = None
    wait_until(lambda: [node.id for node in view.nodes()] == ["a"], message="the view follows")
    assert view.answers
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        f"the registry does not answer, jobs are placed by the last view: {error}", "the registry answers again",
    ]  # fmt: skip
