"""Lists come to their shares, whatever else happens to them meanwhile."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cluster_tasks.broker.epochs import Beat, Predecessor
from cluster_tasks.broker.message import Placement, place_message
from cluster_tasks.clock import SystemClock
from cluster_tasks.failover.evacuation import Remains
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.rebalance import Rebalance
from cluster_tasks.model import Capacity, Node, NodeRole
from cluster_tasks.redis_store import load_script
from tests.broker import SUFFIXES, Broker, job_of, make_message


def node(node_id: str, *serves: str, slots: int = 1) -> Node:
    return Node(id=node_id, serves=frozenset(serves), capacity=Capacity(max_connections=slots))


def rebalance_of(broker: Broker) -> Rebalance:
    return Rebalance(broker.client, broker.keys, broker.epochs, EventLog(broker.client, broker.keys, SystemClock()))


@pytest.fixture
def rebalance(broker: Broker) -> Rebalance:
    """That of the cluster."""
    return rebalance_of(broker)


def events_of(broker: Broker) -> list[dict[str, object]]:
    return [event.facts for event in EventLog(broker.client, broker.keys, SystemClock()).latest()]


def test_what_came_last_moves_behind_what_others_have_and_keeps_its_order(broker: Broker, rebalance: Rebalance) -> None:
    for node_id in "ab":
        broker.open(node_id, "llm")
    for number in range(10):
        broker.publish(f"a{number}", "a", "llm")
    broker.publish("b0", "b", "llm")
    done = rebalance.run([node("a", "llm"), node("b", "llm")])
    assert (done.taken, done.given) == ({"a": 4}, {"b": 4})
    assert broker.listed("node.a") == [f"a{number}" for number in range(6)]
    assert broker.listed("node.b") == ["b0", "a6", "a7", "a8", "a9"]
    assert broker.epochs.lengths() == {"node.a": 6, "node.b": 5}
    assert events_of(broker) == [{"moved": 4, "taken": {"a": 4}, "given": {"b": 4}}]
    assert rebalance.run([node("a", "llm"), node("b", "llm")]).moved == 0
    assert len(events_of(broker)) == 1


def test_a_long_list_is_moved_in_order_in_many_steps_and_in_several_runs(broker: Broker, rebalance: Rebalance) -> None:
    for node_id in "abc":
        broker.open(node_id, "llm")
    for number in range(1500):
        broker.publish(f"{number}", "a", "llm")
    nodes = [node("a", "llm"), node("b", "llm"), node("c", "llm")]
    assert rebalance.run(nodes, most=450).moved == 450
    assert rebalance.run(nodes).moved == 550
    for node_id in "abc":
        listed = list(map(int, broker.listed(f"node.{node_id}")))
        assert len(listed) == 500
        assert listed == sorted(listed)
    assert broker.listed("node.a")[-1] == "499"


def test_each_priority_is_balanced_by_itself_and_kept(broker: Broker, rebalance: Rebalance) -> None:
    for node_id in "ab":
        broker.open(node_id, "llm")
    for number in range(4):
        broker.publish(f"urgent {number}", "a", "llm", 0)
        broker.publish(f"patient {number}", "b", "llm", 9)
    rebalance.run([node("a", "llm"), node("b", "llm")])
    assert broker.listed("node.a") == ["urgent 0", "urgent 1", "patient 2", "patient 3"]
    assert broker.listed("node.b") == ["urgent 2", "urgent 3", "patient 0", "patient 1"]
    assert broker.client.llen("node.a" + SUFFIXES[-1]) == 2


def test_what_runs_and_what_is_bound_to_a_node_stays(broker: Broker, rebalance: Rebalance) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    for number in range(3):
        broker.publish(f"held {number}", "a", "llm")
    broker.fetch("a", epoch, 3, ["llm"])
    for number in range(3):
        broker.put(make_message(f"bound {number}", "llm"), "node.a.bound")
    assert rebalance.run([node("a", "llm"), node("b", "llm")]).moved == 0
    assert len(broker.held("a", epoch)) == 3
    assert len(broker.listed("node.a.bound")) == 3


def test_a_job_goes_only_where_its_type_is_served(broker: Broker, rebalance: Rebalance) -> None:
    # A list of mixed types, from which a node of fewer types may not take by itself.
    broker.open("a", "embedding", "llm")
    broker.open("b", "llm")
    for number in range(6):
        broker.publish(f"embedding {number}", "a", "embedding")
        broker.publish(f"llm {number}", "a", "llm")
    rebalance.run([node("a", "embedding", "llm"), node("b", "llm")])
    assert broker.listed("node.b") == ["llm 3", "llm 4", "llm 5"]


@pytest.mark.parametrize("obstacle", ["fenced", "draining", "recovering", "coordinator", "unregistered"])
def test_a_node_that_may_not_work_gets_nothing(obstacle: str, broker: Broker, rebalance: Rebalance) -> None:
    broker.open("a", "llm")
    epoch = broker.open("b", "llm")
    if obstacle in ("fenced", "recovering"):
        broker.epochs.fence("b", Beat(epoch, 0))
    if obstacle == "recovering":
        broker.open("b", "llm", recovery_threshold=2)
    if obstacle == "draining":
        broker.epochs.set_draining("b", True)
    for number in range(10):
        broker.publish(str(number), "a", "llm")
    other = node("b", "llm").model_copy(update={"roles": frozenset({NodeRole.MASTER})} if obstacle[0] == "c" else {})
    assert rebalance.run([node("a", "llm"), *([] if obstacle == "unregistered" else [other])]).moved == 0


def test_a_node_that_is_fenced_after_the_plan_was_made_gets_nothing(broker: Broker) -> None:
    broker.open("a", "llm")
    broker.publish("1", "a", "llm")
    assert move(broker, "a", "gone", ["1"]) == []
    assert broker.listed("node.a") == ["1"]


def move(broker: Broker, source: str, target: str, jobs: list[str], first: int = 0) -> list[str]:
    """Move jobs that were read from the list of a node."""
    by_id = {job_of(message): message for message in broker.client.lrange(f"node.{source}", 0, -1)}
    placements = [placement(broker, by_id.get(job) or make_message(job, "llm"), target) for job in jobs]
    return broker.placer.move_newest(f"node.{source}", f"node.{source}", first, placements)


def placement(broker: Broker, message: bytes, target: str) -> Placement:
    return place_message(json.loads(message), message, broker.keys, f"node.{target}")


def test_jobs_that_are_not_where_they_were_read_are_passed_over(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    for number in range(4):
        broker.publish(str(number), "a", "llm")
    messages = broker.client.lrange("node.a", 0, -1)
    read = [placement(broker, message, "b") for message in reversed(messages)]
    # Meanwhile one was fetched, and two were published.
    assert broker.fetch("a", epoch, 1, ["llm"]).jobs == ["0"]
    for number in (4, 5):
        broker.publish(str(number), "a", "llm")
    assert broker.placer.move_newest("node.a", "node.a", 0, read) == ["node.b"] * 3
    assert broker.placer.move_newest("node.a", "node.a", 0, read) == []
    assert (broker.listed("node.a"), broker.listed("node.b")) == (["4", "5"], ["1", "2", "3"])
    assert broker.epochs.lengths() == {"node.a": 2, "node.b": 3}


def test_a_message_that_stands_in_a_list_twice_is_moved_once_for_each_time_it_is_given(broker: Broker) -> None:
    for node_id in "ab":
        broker.open(node_id, "llm")
    message = make_message("1", "llm")
    for _ in range(2):
        broker.put(message, "node.a")
    assert broker.placer.move_newest("node.a", "node.a", 0, [placement(broker, message, "b")] * 2) == ["node.b"]
    assert (broker.listed("node.a"), broker.listed("node.b")) == (["1"], ["1"])


def test_what_cannot_be_decoded_stays_for_whoever_fetches_it(broker: Broker, rebalance: Rebalance) -> None:
    for node_id in "ab":
        broker.open(node_id, "llm")
    for number in range(4):
        broker.publish(str(number), "a", "llm")
        broker.placer.place([Placement("node.a", "waiting.any", "any", "", f"not a message {number}")])
    rebalance.run([node("a", "llm"), node("b", "llm")])
    assert broker.listed("node.b") == ["2", "3"]
    assert len(broker.listed("node.a")) == 6


# All at once.


@contextmanager
def doing(*duties: Callable[[], None]) -> Iterator[None]:
    """Repeat each duty on a thread of its own until the block is left. What one raises is raised here."""
    stop, errors = threading.Event(), []

    def repeat(duty: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                duty()
        except BaseException as exc:  # noqa: BLE001 - it is raised below
            errors.append(exc)

    threads = [threading.Thread(target=repeat, args=(duty,)) for duty in duties]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_nothing_is_lost_or_doubled_beside_fetches_fences_purges_and_others(broker: Broker, redis_url: str) -> None:
    nodes = [node(node_id, "llm", slots=slots) for node_id, slots in (("a", 1), ("b", 2), ("c", 4))]
    brokers = [Broker(redis_url) for _ in range(7)]
    purge = load_script(brokers[3].client, "cluster_tasks.broker", "purge")
    done: Counter[str] = Counter()
    purged = [0]
    rng = random.Random(7)

    def work() -> None:
        node_id = rng.choice("abc")
        opened = brokers[0].epochs.open(node_id, ["llm"])
        epoch = opened.beat.epoch if isinstance(opened, Predecessor) else opened
        tags = brokers[0].fetch(node_id, epoch, 3, ["llm"]).messages
        # Between fetch and acknowledgement a fence may take them away, and others do them.
        held = brokers[0].keys.unacked(node_id, epoch)
        done.update(job_of(message) for tag, message in tags.items() if brokers[0].client.hdel(held, tag))

    def fence() -> None:
        node_id = rng.choice("abc")
        opened = brokers[1].epochs.open(node_id, ["llm"])
        if isinstance(opened, Predecessor) and rng.random() < 0.02:
            brokers[1].epochs.close(node_id, opened.beat.epoch)
            brokers[1].evacuation.move_remains(Remains(node_id, opened.beat.epoch))

    def drain() -> None:
        if rng.random() < 0.02:
            brokers[2].evacuation.hand_over(rng.choice("abc"))

    def purge_some() -> None:
        if rng.random() < 0.005:
            purged[0] += purge([broker.keys.backlog, "node.b", *("node.b" + suffix for suffix in SUFFIXES)])

    rebalances = [rebalance_of(each) for each in brokers[4:6]]
    moved = [0]

    def move_jobs() -> None:
        moved[0] += rebalances[0].run(nodes).moved

    for node_id in "abc":
        broker.open(node_id, "llm")
    published = 0
    with doing(work, fence, drain, purge_some, move_jobs, lambda: rebalances[1].run(nodes) and None):
        for number in range(1500):
            brokers[6].publish(str(number), rng.choice("aaab"), "llm", rng.choice([0, 0, 9]))
            published += 1
    for node_id in "abc":
        beat = broker.epochs.beats().get(node_id)
        if beat is not None:
            broker.epochs.close(node_id, beat.epoch)
    for node_id, epoch, *_ in broker.epochs.fenced():
        broker.evacuation.move_remains(Remains(node_id, epoch))
    broker.evacuation.move_orphans()
    left = broker.waiting("llm")
    assert moved[0] > 0, "it did nothing"
    assert set(done.values()) <= {1}
    assert not set(left) & set(done)
    assert len(left) == len(set(left))
    assert len(done) + purged[0] + len(left) == published
    assert broker.epochs.lengths() == ({"waiting.llm": len(left)} if left else {})
    assert broker.undecodable() == []
    for each in brokers:
        each.close()
