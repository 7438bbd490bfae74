"""The register of what a node holds, on a real Redis and with a clock of its own."""

from __future__ import annotations

import pytest

from cluster_tasks.broker.deliveries import Deliveries
from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import ManualClock
from cluster_tasks.failover.evacuation import Remains
from tests.broker import Broker, job_of
from workers.redis_server import RedisServer

CRASH = Crash("a", "1-x", "it died", 0.0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(broker: Broker, clock: ManualClock) -> Deliveries:
    """The register of a node of two slots that is sure of itself for ten seconds."""
    register = Deliveries("a", (), broker.keys, broker.client, clock, lambda: 2)
    register.begin(broker.open("a"))
    register.renew(10)
    return register


def fetch(broker: Broker, node: Deliveries) -> list[str]:
    """Fetch into the register, as the channel does; return the tags of the deliveries."""
    epoch, first_tag, acked = node.next_fetch()
    fetched = broker.fetch("a", epoch, node.free_slots(), acked=acked, first_tag=first_tag)
    node.receive(list(fetched.messages.items()), acked)
    return list(fetched.messages)


def delivered(node: Deliveries) -> list[tuple[str, bool]]:
    """What the consumer is given: the jobs, and whether the node had them before."""
    return [(job_of(message), again) for _, message, again in iter(node.next, None)]


def test_past_its_deadline_a_node_starts_and_fetches_nothing_until_it_has_beaten_again(
    broker: Broker, node: Deliveries, clock: ManualClock
) -> None:
    broker.publish("one")
    (tag,) = fetch(broker, node)
    assert node.may_start(tag)
    assert node.free_slots() == 1
    assert delivered(node) == [("one", False)]
    clock.advance(10)
    assert not node.may_start(tag)
    assert node.free_slots() == 0
    node.let_lie(tag)
    assert node.renew(20), "it was late"
    assert node.resync() == 1
    assert delivered(node) == [("one", True)]
    assert node.may_start(tag)
    assert not node.renew(30)


def test_what_a_fetch_under_way_brings_is_not_delivered_twice(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    epoch, first_tag, acked = node.next_fetch()
    fetched = broker.fetch("a", epoch, 2, first_tag=first_tag)
    assert node.resync() == 0
    node.receive(list(fetched.messages.items()), acked)
    assert node.resync() == 0
    assert delivered(node) == [("one", False)]


def test_a_fetch_whose_reply_was_lost_is_delivered_after_the_break(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    epoch, first_tag, _ = node.next_fetch()
    broker.fetch("a", epoch, 2, first_tag=first_tag)
    assert node.resync(running=set()) == 1
    assert delivered(node) == [("one", True)]


def test_after_a_break_what_runs_is_kept_and_what_waited_in_the_worker_comes_again(
    broker: Broker, node: Deliveries
) -> None:
    for job in ("runs", "waits"):
        broker.publish(job)
    running, _ = fetch(broker, node)
    assert delivered(node) == [("runs", False), ("waits", False)]
    assert node.resync(running={running}) == 1
    assert delivered(node) == [("waits", True)]


def test_an_acknowledgement_outlives_an_outage(broker: Broker, node: Deliveries, redis_server: RedisServer) -> None:
    broker.publish("one")
    (tag,) = fetch(broker, node)
    kept = broker.client.hgetall(node.unacked_key)
    redis_server.stop()
    node.at_bell = True
    node.ack(tag)
    node.flush()
    redis_server.start()
    # As a Redis that writes all down has it: what the node held before the outage.
    broker.client.hset(node.unacked_key, mapping=kept)
    node.flush()
    assert not broker.client.exists(node.unacked_key)
    assert node.free_slots() == 2


def test_a_job_that_is_given_back_is_charged_only_if_it_was_blamed(broker: Broker, node: Deliveries) -> None:
    for job in ("innocent", "guilty"):
        broker.publish(job)
    innocent, guilty = fetch(broker, node)
    node.blame(guilty, "it died")
    node.requeue(innocent)
    node.requeue(guilty)
    assert broker.waiting() == ["innocent"]
    assert broker.listed(broker.keys.suspect_queue("any")) == ["guilty"]
    assert [len(node.past(job).crashes) for job in ("innocent", "guilty")] == [0, 1]


def test_what_is_held_back_is_not_charged_with_the_death_of_the_node(broker: Broker, node: Deliveries) -> None:
    for job in ("started", "held back"):
        broker.publish(job)
    _, waits = fetch(broker, node)
    node.hold_back(waits)
    broker.epochs.fence("a", broker.epochs.beats()["a"])
    assert broker.evacuation.move_remains(Remains("a", node.epoch, CRASH)).held == 2
    assert broker.waiting() == ["held back"]
    assert [len(node.past(job).crashes) for job in ("started", "held back")] == [1, 0]
    assert not broker.client.keys("cluster:not_started:*")


def test_what_was_taken_up_during_an_outage_is_told_after_it(
    broker: Broker, node: Deliveries, redis_server: RedisServer
) -> None:
    for job in ("starts", "ends"):
        broker.publish(job)
    starts, ends = fetch(broker, node)
    not_started = broker.keys.not_started("a", node.epoch)
    for tag in (starts, ends):
        node.hold_back(tag)
    redis_server.stop()
    node.take_up(starts)
    node.ack(ends)
    redis_server.start()
    # As a Redis that writes all down has it.
    broker.client.sadd(not_started, starts, ends, "of another")
    node.flush()
    assert broker.client.smembers(not_started) == {b"of another"}


def test_what_a_node_closed_in_good_order_held_is_nobodys_fault(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    fetch(broker, node)
    assert broker.epochs.close("a", node.epoch)
    assert [ended.ending for ended in broker.epochs.fenced()] == ["closed"]
    broker.evacuation.move_remains(Remains("a", node.epoch))
    assert (broker.waiting(), node.past("one").crashes) == (["one"], ())


def test_a_node_is_given_one_suspect_at_a_time(broker: Broker, node: Deliveries) -> None:
    for job in ("one", "two"):
        broker.publish(job)
    for tag in fetch(broker, node):
        node.blame(tag, "it died")
        node.requeue(tag)
    (first,) = fetch(broker, node)
    assert fetch(broker, node) == []
    node.ack(first)
    assert len(fetch(broker, node)) == 1


def test_what_was_taken_from_a_node_is_not_started_acknowledged_or_given_back_by_it(
    broker: Broker, node: Deliveries
) -> None:
    broker.publish("one")
    broker.publish("two")
    seen, unseen = fetch(broker, node)
    assert node.next() is not None
    assert node.disown() == set()
    broker.epochs.set_draining("a", True)
    assert broker.evacuation.hand_back("a", node.epoch).held == 2
    assert node.disown() == {seen}, "what nobody has seen is just forgotten"
    assert delivered(node) == []
    assert not node.may_start(seen)
    assert node.held() == 1, "it runs, and fills a slot until it ends"
    assert node.holds_only_what_was_taken()
    node.blame(seen, "it died")
    node.requeue(seen)
    assert (node.held(), node.disown(), node.holds_only_what_was_taken()) == (0, set(), False)
    assert broker.waiting() == ["one", "two"]
    assert not broker.client.exists(broker.keys.crashes("one"))
    assert not node.may_start(unseen)


def test_what_a_node_has_committed_itself_was_not_taken_from_it(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    (tag,) = fetch(broker, node)
    assert node.next() is not None
    # As a commit in a process of the pool leaves it, before the parent hears of it.
    broker.client.hdel(node.unacked_key, tag)
    broker.client.set(broker.keys.terminal("one"), f"{tag} SUCCESS")
    assert node.disown() == set()
    broker.client.set(broker.keys.terminal("one"), "others.1.1 SUCCESS")
    assert node.disown() == {tag}


def test_an_epoch_that_has_ended_takes_what_runs_with_it(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    (tag,) = fetch(broker, node)
    assert node.next() is not None
    broker.epochs.close("a", node.epoch)
    broker.evacuation.move_remains(Remains("a", node.epoch))
    node.begin(broker.open("a"))
    assert node.disown() == {tag}


def test_a_job_that_was_taken_without_a_crash_says_whether_it_may_have_begun(broker: Broker, node: Deliveries) -> None:
    broker.publish("begun")
    broker.publish("held back")
    _, held_back = fetch(broker, node)
    node.hold_back(held_back)
    broker.epochs.set_draining("a", True)
    broker.evacuation.hand_back("a", node.epoch)
    node.disown()
    broker.epochs.set_draining("a", False)
    fetch(broker, node)
    marks = {job_of(message): b'"interrupted": true' in message for _, message, _ in iter(node.next, None)}
    assert marks == {"begun": True, "held back": False}


def test_only_the_chosen_deliveries_are_taken_back_and_charged(broker: Broker, node: Deliveries) -> None:
    broker.publish("one")
    broker.publish("two")
    first, _ = fetch(broker, node)
    assert broker.evacuation.hand_back("a", node.epoch, CRASH, [first]).held == 1
    assert broker.held("a", node.epoch) == ["two"]
    assert broker.client.llen(broker.keys.crashes("one")) == 1


def test_what_ends_before_it_is_delivered_again_is_not_delivered(broker: Broker, node: Deliveries) -> None:
    broker.publish("job", "a")
    (tag,) = fetch(broker, node)
    assert delivered(node) == [("job", False)]
    # Its connection broke, it is to be delivered again, and the thread that runs it comes to its end.
    node.resync(set())
    node.ack(tag)
    assert delivered(node) == []
