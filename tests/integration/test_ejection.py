"""Ejecting nodes: what the scripts hold them to, and how observers lead them out and in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby

import pytest

from cluster_tasks.breaker import BreakerPolicy
from cluster_tasks.broker.epochs import Beat, Limit, Phase
from cluster_tasks.clock import ManualClock, SystemClock
from cluster_tasks.failover.ejection import RAMP_STEP_S, Ejection
from cluster_tasks.failover.events import EventLog
from cluster_tasks.model import Capacity, Load, Node, Recent
from tests.broker import Broker, make_message

TIMEOUT_S = 30.0
LEASE_S = 10.0
EJECTED, HALF_OPEN = Limit(0, Phase.EJECTED, "t1"), Limit(1, Phase.HALF_OPEN, "t1")
BAD, GOOD = Recent(jobs=20, failures=20), Recent(jobs=20, latency_s=1.0)


def limit(broker: Broker, node_id: str) -> Limit | None:
    return broker.epochs.lists().limits.get(f"node.{node_id}")


def set_limit(broker: Broker, node_id: str, wanted: Limit | None, *, if_half_stay: bool | None = None) -> bool:
    epoch = broker.epochs.beats()[node_id].epoch
    return broker.epochs.limit(node_id, epoch, limit(broker, node_id), wanted, if_half_stay=if_half_stay)


# The scripts.


def test_an_ejected_node_is_given_nothing(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    broker.fetch("a", epoch, serves=["llm"])
    assert set_limit(broker, "a", EJECTED)
    assert broker.idle() == []
    assert broker.publish("1", "a", "llm") == "waiting.llm"
    assert broker.publish("2", "b", "llm") == "node.b"
    fetched = broker.fetch("a", epoch, 2, ["llm"])
    assert (fetched.status, fetched.jobs) == ("limited t1", [])
    assert broker.idle() == []
    assert broker.rings("a") == 0


def test_what_is_acknowledged_with_a_fetch_in_vain_is_forgotten(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("1", "a", "llm")
    (tag,) = broker.fetch("a", epoch, serves=["llm"]).messages
    set_limit(broker, "a", EJECTED)
    broker.fetch("a", epoch, acked=[tag])
    assert broker.held("a", epoch) == []


def test_a_half_open_node_is_given_one_probe_whatever_it_holds_from_before(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    for number in range(5):
        broker.publish(str(number), "", "llm")
    broker.fetch("a", epoch, 2, ["llm"])
    set_limit(broker, "a", HALF_OPEN)
    assert broker.publish("5", "a", "llm") == "waiting.llm"
    fetched = broker.fetch("a", epoch, 3, ["llm"])
    assert (fetched.status, fetched.jobs) == ("limited t1", ["2"])
    assert limit(broker, "a") == Limit(0, Phase.PROBING, "t1", 1)
    assert broker.fetch("a", epoch, 3, ["llm"]).jobs == []


def test_a_probe_that_finds_no_job_is_offered_still(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    set_limit(broker, "a", HALF_OPEN)
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == []
    assert limit(broker, "a") == HALF_OPEN
    assert broker.idle() == []


def test_no_suspect_is_a_probe(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.client.lpush("suspect.llm", make_message("killer", "llm"))
    broker.client.zadd(broker.keys.backlog, {"suspect.llm": 1})
    set_limit(broker, "a", HALF_OPEN)
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == []


def test_a_node_that_ramps_up_holds_no_more_than_its_slots_and_is_placed_on(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    set_limit(broker, "a", Limit(2, Phase.RAMPING, "t1"))
    for number in range(5):
        assert broker.publish(str(number), "a", "llm") == "node.a"
    fetched = broker.fetch("a", epoch, 4, ["llm"])
    assert fetched.jobs == ["0", "1"]
    assert broker.fetch("a", epoch, 2, ["llm"]).jobs == []
    assert broker.fetch("a", epoch, 2, ["llm"], acked=list(fetched.messages)).jobs == ["2", "3"]


def test_what_is_bound_to_an_ejected_node_waits_there(broker: Broker) -> None:
    broker.open("a", "llm")
    set_limit(broker, "a", EJECTED)
    assert broker.put(make_message("1", "llm"), "node.a.bound") == "node.a.bound"
    broker.evacuation.hand_over_unbound("a")
    assert broker.listed("node.a.bound") == ["1"]


def test_the_limit_ends_with_the_epoch(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    set_limit(broker, "a", EJECTED)
    broker.epochs.close("a", epoch)
    assert broker.epochs.lists().limits == {}
    assert not broker.epochs.limit("a", epoch, None, EJECTED)
    assert broker.publish("1", broker.open("a", "llm") and "a", "llm") == "node.a"


def test_a_limit_is_changed_only_if_it_is_what_was_seen(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    assert not broker.epochs.limit("a", "another", None, EJECTED)
    assert not broker.epochs.limit("a", epoch, HALF_OPEN, EJECTED)
    assert broker.epochs.limit("a", epoch, None, EJECTED)
    assert not broker.epochs.limit("a", epoch, None, EJECTED)
    assert broker.epochs.limit("a", epoch, EJECTED, None)
    assert broker.epochs.lists().limits == {}


def test_a_node_that_is_out_is_sent_a_job_that_others_do_not_know_only_if_no_other_knows_it(broker: Broker) -> None:
    for node_id in "abc":
        broker.epochs.open(node_id, ["llm"], ["new"] if node_id in "ab" else [])
    set_limit(broker, "a", EJECTED)
    assert broker.epochs.knowing("new", "llm") == ["b"]
    set_limit(broker, "b", EJECTED)
    assert broker.epochs.knowing("new", "llm") == ["a", "b"]
    set_limit(broker, "a", Limit(1, Phase.RAMPING, "t1"))
    assert broker.epochs.knowing("new", "llm") == ["a"]


@pytest.mark.parametrize(("count", "allowed"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_half_of_the_nodes_stay(count: int, allowed: int, broker: Broker) -> None:
    broker.open("coordinator")
    for number in range(count):
        broker.open(f"n{number}", "llm")
    done = [set_limit(broker, f"n{number}", EJECTED, if_half_stay=True) for number in range(count)]
    assert done == [number < allowed for number in range(count)]


def test_half_of_those_that_serve_a_type_stay(broker: Broker) -> None:
    for node_id in "abcd":
        broker.open(node_id, "llm")
    for node_id in ("x", "y"):
        broker.open(node_id, "llm", "ocr")
    broker.open("only", "embedding")
    assert not set_limit(broker, "only", EJECTED, if_half_stay=True)
    assert set_limit(broker, "x", EJECTED, if_half_stay=True)
    assert not set_limit(broker, "y", EJECTED, if_half_stay=True)
    assert set_limit(broker, "a", EJECTED, if_half_stay=True)


def test_nodes_that_drain_do_not_count_among_those_that_stay(broker: Broker) -> None:
    for node_id in "ab":
        broker.open(node_id, "llm")
    broker.epochs.set_draining("b", True)
    assert not set_limit(broker, "a", EJECTED, if_half_stay=True)


def test_a_node_is_let_in_for_the_number_of_the_others_only_if_too_few_are_left(broker: Broker) -> None:
    epochs = {node_id: broker.open(node_id, "llm") for node_id in "abcd"}
    for node_id in "ab":
        assert set_limit(broker, node_id, EJECTED, if_half_stay=True)
    assert not set_limit(broker, "a", None, if_half_stay=False)
    broker.epochs.fence("c", Beat(epochs["c"], 0))
    assert set_limit(broker, "a", None, if_half_stay=False)
    assert not set_limit(broker, "b", None, if_half_stay=False)
    # One that recovers from a loss stays: it is in again in a moment.
    broker.open("c", "llm", recovery_threshold=2)
    assert not set_limit(broker, "b", None, if_half_stay=False)
    broker.epochs.set_draining("a", True)
    broker.epochs.set_draining("d", True)
    assert set_limit(broker, "b", None, if_half_stay=False)


def test_many_observers_at_once_leave_half_of_the_nodes(broker: Broker, redis_url: str) -> None:
    for number in range(8):
        broker.open(f"n{number}", "llm")
    beats = broker.epochs.beats()
    brokers = [Broker(redis_url) for _ in range(4)]

    def eject_all(one: Broker, order: Sequence[int]) -> None:
        for number in order:
            one.epochs.limit(f"n{number}", beats[f"n{number}"].epoch, None, EJECTED, if_half_stay=True)

    orders = [range(8), range(7, -1, -1), [3, 4, 0, 7, 1, 6, 2, 5], [5, 2, 6, 1, 7, 0, 4, 3]]
    threads = [threading.Thread(target=eject_all, args=pair) for pair in zip(brokers, orders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(broker.epochs.lists().limits) == 4
    for each in brokers:
        each.close()


# The observers.


class Cluster:
    """Nodes of four slots whose reports the test writes, and observers on a clock that it moves."""

    def __init__(self, broker: Broker, names: str, observers: int = 1) -> None:
        self.broker, self.clock = broker, ManualClock(1000.0)
        self.epochs = {name: broker.open(name, "llm") for name in names}
        self.reports = dict.fromkeys(names, (GOOD, ""))
        self.events = EventLog(broker.client, broker.keys, SystemClock())
        policy = BreakerPolicy(success_threshold=2, timeout_s=TIMEOUT_S, probe_lease_s=LEASE_S)
        self.observers = [
            Ejection(
                broker.epochs, broker.evacuation, self.events, broker.keys, self.clock, policy, 10.0, self.nodes
            )
            for _ in range(observers)
        ]  # fmt: skip

    def nodes(self) -> list[Node]:
        return [
            Node(
                id=name, serves=frozenset({"llm"}), epoch=self.epochs[name], capacity=Capacity(max_connections=4),
                load=Load(recent={"llm": recent} if recent.jobs else {}, trial=trial),
            )
            for name, (recent, trial) in self.reports.items()
        ]  # fmt: skip

    def check(self, after_s: float = 0.0) -> Limit | None:
        """Let time pass and all observers look; return the limit of node a."""
        self.clock.advance(after_s)
        for observer in self.observers:
            observer.check()
        return limit(self.broker, "a")

    def report(self, name: str, recent: Recent) -> None:
        """Let a node tell of its jobs, as part of the trial that it is in."""
        standing = limit(self.broker, name)
        self.reports[name] = (recent, standing.trial if standing else "")

    def probe(self) -> list[str]:
        """Let node a fetch; return what it was given."""
        self.broker.publish(f"job {self.clock.monotonic()}", "", "llm")
        return self.broker.fetch("a", self.epochs["a"], 4, ["llm"]).jobs

    def told(self) -> list[str]:
        return [event.kind for event in self.events.latest()]


@pytest.mark.parametrize("observers", [1, 3])
def test_a_node_that_fails_is_ejected_probed_ramped_up_and_back(observers: int, broker: Broker) -> None:
    cluster = Cluster(broker, "abc", observers)
    broker.publish("listed", "a", "llm")
    cluster.report("a", BAD)
    ejected = cluster.check()
    assert ejected is not None
    assert (ejected.slots, ejected.phase) == (0, Phase.EJECTED)
    assert broker.waiting("llm") == ["listed"]
    assert cluster.told() == ["breaker open"]

    assert cluster.check(TIMEOUT_S - 1) == ejected
    for number in (1, 2):
        half_open = cluster.check(1.0)
        assert half_open == Limit(1, Phase.HALF_OPEN, ejected.trial, number - 1)
        assert len(cluster.probe()) == 1
        assert cluster.check(1.0) == Limit(0, Phase.PROBING, ejected.trial, number)
        cluster.report("a", Recent(jobs=number, latency_s=1.0))
    seen = [cluster.check(1.0) for _ in range(12)]
    # A step is counted from when an observer has seen it.
    steps = [len(list(same)) for _, same in groupby(seen)]
    assert list(dict.fromkeys(seen)) == [*(Limit(slots, Phase.RAMPING, ejected.trial) for slots in (1, 2)), None]
    assert all(RAMP_STEP_S <= step <= RAMP_STEP_S + 1 for step in steps[:2])
    assert cluster.told() == ["breaker open", "breaker closed"]
    # What it reports still is of the trial, and says nothing of the time since.
    assert cluster.check(1.0) is None


def test_what_a_node_did_before_it_was_ejected_is_no_probe(broker: Broker) -> None:
    cluster = Cluster(broker, "abc")
    cluster.report("a", BAD)
    cluster.check()
    cluster.check(TIMEOUT_S)
    cluster.probe()
    # Its report is of no trial yet.
    cluster.reports["a"] = (GOOD, "")
    standing = cluster.check(1.0)
    assert standing is not None
    assert standing.phase is Phase.PROBING


@pytest.mark.parametrize("outcome", [Recent(jobs=1, failures=1), Recent(jobs=1, latency_s=11.0)], ids=["fails", "slow"])
def test_a_bad_probe_ejects_the_node_at_once_again(outcome: Recent, broker: Broker) -> None:
    cluster = Cluster(broker, "abc")
    cluster.report("a", BAD)
    before = cluster.check()
    cluster.check(TIMEOUT_S)
    cluster.probe()
    cluster.check(1.0)
    cluster.report("a", outcome)
    after = cluster.check(1.0)
    assert before is not None
    assert after is not None
    assert after.phase is Phase.EJECTED
    assert after.trial != before.trial
    assert cluster.check(TIMEOUT_S - 1) == after
    assert cluster.told() == ["breaker open"], "a probe that failed is no news"


def test_a_probe_that_hangs_makes_room_for_another_when_its_lease_ends(broker: Broker) -> None:
    cluster = Cluster(broker, "abc", observers=2)
    cluster.report("a", BAD)
    cluster.check()
    offered = cluster.check(TIMEOUT_S)
    assert offered is not None
    # It lies there for long before it is taken.
    assert cluster.check(5 * LEASE_S) == offered
    cluster.probe()
    taken = cluster.check(1.0)
    assert taken == Limit(0, Phase.PROBING, offered.trial, 1)
    assert cluster.check(LEASE_S - 1) == taken
    assert cluster.check(1.0) == Limit(1, Phase.HALF_OPEN, offered.trial, 1)


def test_a_node_that_is_bad_while_it_ramps_up_is_ejected_again(broker: Broker) -> None:
    cluster = Cluster(broker, "abc")
    set_limit(broker, "a", Limit(2, Phase.RAMPING, "t1"))
    cluster.report("a", BAD)
    standing = cluster.check()
    assert standing is not None
    assert standing.phase is Phase.EJECTED
    assert cluster.told() == ["breaker open"]


def test_an_observer_that_comes_late_leads_a_node_on(broker: Broker) -> None:
    cluster = Cluster(broker, "abc")
    set_limit(broker, "a", Limit(0, Phase.PROBING, "t1", 2))
    cluster.report("a", Recent(jobs=2, latency_s=1.0))
    assert cluster.check() == Limit(1, Phase.RAMPING, "t1")


def test_where_all_nodes_fail_alike_none_is_ejected(broker: Broker) -> None:
    cluster = Cluster(broker, "abc")
    for name in "abc":
        cluster.report(name, BAD)
    assert cluster.check() is None
    assert broker.epochs.lists().limits == {}


def test_of_many_bad_nodes_half_stay_and_those_left_are_let_in_when_others_go(broker: Broker) -> None:
    cluster = Cluster(broker, "abcde")
    for name in "ab":
        cluster.report(name, BAD)
    cluster.check()
    assert set(broker.epochs.lists().limits) == {"node.a", "node.b"}
    # Two of three would be more than half.
    for name in "cd":
        broker.epochs.fence(name, Beat(cluster.epochs.pop(name), 0))
        del cluster.reports[name]
    assert cluster.check(1.0) is None
    assert set(broker.epochs.lists().limits) == {"node.b"}
    assert cluster.told() == ["breaker open", "breaker open", "breaker closed"]


def test_a_node_that_recovers_from_a_loss_is_left_to_its_beats(broker: Broker) -> None:
    cluster = Cluster(broker, "bc")
    broker.epochs.fence("a", Beat(broker.open("a", "llm"), 0))
    cluster.epochs["a"] = broker.open("a", "llm", recovery_threshold=2)
    cluster.reports["a"] = (BAD, "")
    standing = cluster.check()
    assert standing is not None
    assert standing.phase is Phase.RECOVERING
