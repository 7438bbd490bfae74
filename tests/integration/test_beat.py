"""What a node learns when it beats, and when its beat rings its own doorbell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster_tasks.addresses.secret import SecretUrl
from cluster_tasks.broker.revocations import Revocations
from cluster_tasks.failover.watchers import Watchers
from cluster_tasks.settings import ClusterSettings
from tests.broker import Broker
from tests.waiting import wait_until
from workers.heartbeat import HeartbeatProcess

END_S = 30.0


@pytest.fixture
def epoch(broker: Broker) -> str:
    """Of an idle node ``a`` that serves ``llm``."""
    begun = broker.open("a", "llm")
    broker.fetch("a", begun, serves=["llm"])
    assert broker.idle() == ["node.a"]
    return begun


def test_an_idle_node_is_not_rung_for_nothing(broker: Broker, epoch: str) -> None:
    broker.client.zadd(broker.keys.delayed, {"later": time.time() + 60})
    broker.epochs.beat("a", epoch, at_bell=True)
    assert broker.rings("a") == 0


@pytest.mark.parametrize("lost", ["its place among the idle", "a ring", "the time of a job"])
def test_a_node_at_its_doorbell_that_was_missed_is_rung_once(broker: Broker, epoch: str, lost: str) -> None:
    if lost == "its place among the idle":
        broker.client.delete(broker.keys.idle)
    elif lost == "a ring":
        broker.client.zadd(broker.keys.backlog, {"waiting.llm": 1})
    else:
        broker.client.zadd(broker.keys.delayed, {"due": time.time() - 5})
    broker.epochs.beat("a", epoch)
    assert broker.rings("a") == 0
    for _ in range(2):
        broker.epochs.beat("a", epoch, at_bell=True)
        assert broker.rings("a") == 1
    assert 0 < broker.client.ttl(broker.keys.bell("a")) <= 60


def test_a_node_that_drained_is_rung_when_it_is_to_go_on(broker: Broker, epoch: str) -> None:
    broker.epochs.set_draining("a", True)
    broker.fetch("a", epoch, serves=["llm"])
    broker.epochs.set_draining("a", False)
    broker.epochs.beat("a", epoch, at_bell=True)
    assert broker.rings("a") == 1


def test_a_node_whose_beats_were_awaited_is_rung_when_they_are_enough(broker: Broker) -> None:
    fenced = broker.open("a", "llm")
    assert broker.epochs.fence("a", broker.epochs.beats()["a"])
    broker.epochs.forget({("a", fenced): {}})
    epoch = broker.open("a", "llm", recovery_threshold=2)
    assert broker.fetch("a", epoch, serves=["llm"]).status == "limited"
    for _ in range(2):
        broker.epochs.beat("a", epoch, at_bell=True)
    assert broker.rings("a") == 1
    assert broker.fetch("a", epoch, serves=["llm"]).status == "ok"


def test_who_beats_learns_how_many_observe(broker: Broker, epoch: str) -> None:
    seats = Watchers(broker.client, broker.keys, lease_s=60.0)
    for node_id in ("b", "c"):
        seats.take_seat(node_id)
    assert broker.epochs.beat("a", epoch).observers == 2


def test_who_beats_learns_that_jobs_were_revoked(broker: Broker, epoch: str) -> None:
    revocations = Revocations(broker.client, broker.keys)

    def revoked() -> str:
        return broker.epochs.beat("a", epoch).revoked

    words = [revoked()]
    # Also within one second.
    for step in (["one"], ["two"], ["one"], {"batch": "7"}, {"batch": "8"}):
        if isinstance(step, dict):
            revocations.add_stamps(step)
        else:
            revocations.add(step)
        words.append(revoked())
    assert len(set(words)) == len(words)
    assert revoked() == words[-1]


def test_a_package_of_the_users_does_not_beat_in_the_place_of_ours(
    broker: Broker, epoch: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workers").mkdir()
    for name in ("__init__.py", "heartbeat.py"):
        (tmp_path / "workers" / name).touch()
    monkeypatch.chdir(tmp_path)
    beating = HeartbeatProcess(ClusterSettings(broker_url=SecretUrl(redis_url), heartbeat_s=0.05), "a")
    try:
        beating.start()
        beating.beat_for(epoch)
        before = broker.epochs.beats()["a"].counter
        wait_until(lambda: broker.epochs.beats()["a"].counter > before, END_S)
    finally:
        beating.stop()
