"""What is remembered of revoked jobs, and who learns of it."""

from __future__ import annotations

import pytest

from cluster_tasks.broker.revocations import REVOKED_LIVES_S, Revocations
from tests.broker import Broker


@pytest.fixture
def revocations(broker: Broker) -> Revocations:
    return Revocations(broker.client, broker.keys)


def now_s(broker: Broker) -> int:
    seconds, _ = broker.client.time()  # type: ignore[misc]
    return int(seconds)


def test_who_has_read_all_learns_what_is_revoked_then(revocations: Revocations) -> None:
    revocations.add(["one"])
    ids, _ = revocations.since(0)
    revocations.add(["two", "three"])
    later, _ = revocations.since(max(ids.values()))
    assert {"two", "three"} <= later.keys()


def test_what_is_revoked_after_the_clock_of_redis_was_set_back_is_learnt(
    broker: Broker, revocations: Revocations
) -> None:
    # Written when that clock was ahead.
    broker.client.zadd(broker.keys.revoked, {"before": now_s(broker) + 300})
    ids, _ = revocations.since(0)
    revocations.add(["after"])
    later, _ = revocations.since(max(ids.values()))
    assert "after" in later


def test_what_was_revoked_a_week_ago_is_forgotten(broker: Broker, revocations: Revocations) -> None:
    broker.client.zadd(broker.keys.revoked, {"old": now_s(broker) - REVOKED_LIVES_S - 60})
    revocations.add(["new"])
    ids, _ = revocations.since(0)
    assert ids.keys() == {"new"}


def test_so_many_are_remembered_and_the_oldest_go(broker: Broker, revocations: Revocations) -> None:
    broker.client.zadd(broker.keys.revoked, {"old": now_s(broker) - 60})
    revocations.add(str(number) for number in range(100_000))
    ids, _ = revocations.since(0)
    assert len(ids) == 100_000
    assert "old" not in ids
