"""Each script, branch by branch. What holds over any sequence of them is in test_conservation."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from cluster_tasks.broker.delays import delayed_jobs
from cluster_tasks.broker.epochs import Beat, Predecessor, Standing
from cluster_tasks.broker.message import replace_message
from cluster_tasks.broker.placement import UNDECODABLE_KEPT, Crash, Why
from cluster_tasks.failover.evacuation import Remains
from cluster_tasks.redis_store import load_script, text
from tests.broker import SUFFIXES, Broker, Fetched, job_of, make_message

# place


def test_a_job_goes_to_the_list_of_its_node(broker: Broker) -> None:
    broker.open("a", "llm")
    assert broker.publish("1", "a", "llm") == "node.a"
    assert broker.listed("node.a") == ["1"]
    assert broker.epochs.lengths() == {"node.a": 1}


@pytest.mark.parametrize("target", ["", "never-joined"])
def test_a_job_without_a_node_waits_by_its_type(broker: Broker, target: str) -> None:
    assert broker.publish("1", target, "llm") == "waiting.llm"
    assert broker.waiting("llm") == ["1"]
    assert broker.epochs.lengths() == {"waiting.llm": 1}


def test_a_job_for_a_fenced_node_waits_by_its_type(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    assert broker.epochs.fence("a", Beat(epoch, 0))
    assert broker.publish("1", "a", "llm") == "waiting.llm"


def test_a_job_for_a_draining_node_waits_and_after_resume_does_not(broker: Broker) -> None:
    broker.open("a", "llm")
    broker.epochs.set_draining("a", True)
    assert broker.publish("1", "a", "llm") == "waiting.llm"
    broker.epochs.set_draining("a", False)
    assert broker.publish("2", "a", "llm") == "node.a"


def test_the_target_is_rung_if_it_idles(broker: Broker) -> None:
    for node_id in "ab":
        broker.fetch(node_id, broker.open(node_id, "llm"))
    broker.publish("1", "b", "llm")
    assert (broker.rings("a"), broker.rings("b")) == (0, 1)
    assert broker.idle() == ["node.a"]


def test_else_an_idle_node_that_may_take_the_job_is_rung(broker: Broker) -> None:
    broker.open("busy", "llm")
    broker.fetch("other", broker.open("other", "embedding"))
    broker.fetch("peer", broker.open("peer", "embedding", "llm"))
    assert broker.publish("1", "busy", "llm") == "node.busy"
    assert (broker.rings("busy"), broker.rings("other"), broker.rings("peer")) == (0, 0, 1)


def test_an_idle_node_that_could_run_a_job_but_may_not_take_it_gets_it(broker: Broker) -> None:
    broker.open("broad", "embedding", "llm")
    broker.fetch("narrow", broker.open("narrow", "llm"), serves=["llm"])
    assert broker.publish("1", "broad", "llm") == "node.narrow"
    assert (broker.rings("broad"), broker.rings("narrow")) == (0, 1)
    # It idles no longer, so the next job stays where it was sent.
    assert broker.publish("2", "broad", "llm") == "node.broad"
    assert broker.epochs.lengths() == {"node.broad": 1, "node.narrow": 1}


def test_an_idle_node_that_may_take_comes_before_one_that_idles_longer_and_may_not(broker: Broker) -> None:
    broker.open("busy", "embedding", "llm")
    for node_id, serves in ("a-narrow", ["llm"]), ("z-broad", ["embedding", "llm"]):
        broker.fetch(node_id, broker.open(node_id, *serves), serves=serves)
    assert broker.idle() == ["node.a-narrow", "node.z-broad"]
    assert broker.publish("1", "busy", "llm") == "node.busy"
    assert (broker.rings("a-narrow"), broker.rings("z-broad")) == (0, 1)


def test_a_waiting_job_rings_the_node_that_idles_longest_among_those_that_serve_it(broker: Broker) -> None:
    for node_id, serves in ("a", "embedding"), ("b", "llm"), ("c", "llm"):
        broker.fetch(node_id, broker.open(node_id, serves), serves=[serves])
    broker.client.zadd(broker.keys.idle, {"node.c": 1, "node.a": 2, "node.b": 3})
    assert broker.publish("1", "", "llm") == "waiting.llm"
    assert (broker.rings("a"), broker.rings("b"), broker.rings("c")) == (0, 0, 1)


@pytest.mark.parametrize("others", [1, 40])
def test_an_idle_node_of_the_zone_is_rung_before_those_of_others_that_idle_longer(broker: Broker, others: int) -> None:
    broker.open("busy", "llm", zone="a")
    for number in range(others):
        broker.fetch(f"far{number:02}", broker.open(f"far{number:02}", "llm", zone="b"))
    broker.fetch("near", broker.open("near", "llm", zone="a"))
    assert broker.idle()[0] == "node.far00"
    assert broker.publish("1", "busy", "llm") == "node.busy"
    assert (broker.rings("far00"), broker.rings("near")) == (0, 1)
    # Nobody else idles in the zone: the job must not wait for that.
    assert broker.publish("2", "busy", "llm") == "node.busy"
    assert broker.rings("far00") == 1


def test_a_job_is_handed_over_within_its_zone_if_someone_idles_there(broker: Broker) -> None:
    broker.open("busy", "embedding", "llm", zone="a")
    for node_id, zone in ("far", "b"), ("near", "a"):
        broker.fetch(node_id, broker.open(node_id, "llm", zone=zone), serves=["llm"])
    assert broker.publish("1", "busy", "llm") == "node.near"


def test_a_job_for_a_node_that_drains_rings_a_node_of_its_zone(broker: Broker) -> None:
    broker.open("leaving", "llm", zone="a")
    broker.epochs.set_draining("leaving", True)
    for node_id, zone in ("far", "b"), ("near", "a"):
        broker.fetch(node_id, broker.open(node_id, "llm", zone=zone))
    assert broker.publish("1", "leaving", "llm") == "waiting.llm"
    assert (broker.rings("far"), broker.rings("near")) == (0, 1)


def test_the_zone_of_a_node_goes_with_its_epoch(broker: Broker) -> None:
    zones = broker.keys.zones
    broker.epochs.close("a", broker.open("a", "llm", zone="west"))
    assert not broker.client.exists(zones)
    broker.open("a", "llm", zone="east")
    assert broker.client.hgetall(zones) == {b"node.a": b"east"}


def test_a_draining_node_is_not_rung(broker: Broker) -> None:
    broker.fetch("a", broker.open("a", "llm"))
    broker.epochs.set_draining("a", True)
    broker.publish("1", "", "llm")
    assert broker.rings("a") == 0


def test_an_idle_node_is_found_behind_a_page_of_others(broker: Broker) -> None:
    for number in range(40):
        broker.fetch(f"a{number:02}", broker.open(f"a{number:02}", "embedding"))
    broker.fetch("z", broker.open("z", "llm"))
    broker.publish("1", "", "llm")
    assert broker.rings("z") == 1


def test_a_doorbell_that_nobody_answers_goes_away_by_itself(broker: Broker) -> None:
    broker.fetch("a", broker.open("a", "llm"))
    broker.publish("1", "a", "llm")
    assert 0 < broker.client.ttl(broker.keys.bell("a")) <= 60


def test_a_batch_is_placed_in_its_order(broker: Broker) -> None:
    broker.open("a", "llm")
    placements = [replace_message(make_message(str(n), "llm"), broker.keys, delivered=False) for n in range(5)]
    assert broker.placer.place(placements) == ["waiting.llm"] * 5
    assert broker.waiting("llm") == list("01234")
    assert broker.placer.place([]) == []


def test_jobs_of_each_priority_have_a_list_and_one_entry_in_the_index(broker: Broker) -> None:
    broker.open("a", "llm")
    for priority in (9, 6, 3, 0):
        broker.publish(f"p{priority}", "a", "llm", priority)
    assert [broker.client.llen("node.a" + suffix) for suffix in SUFFIXES] == [1, 1, 1, 1]
    assert broker.epochs.lengths() == {"node.a": 4}


# fetch


def test_waiting_jobs_come_first_then_the_nodes_own_then_those_of_the_longest_peer(broker: Broker) -> None:
    epoch = broker.open("a", "embedding", "llm")
    for node_id in "bc":
        broker.open(node_id, "llm")
    for job_id, node_id in (("own", "a"), ("b1", "b"), ("c1", "c"), ("c2", "c"), ("c3", "c")):
        broker.publish(job_id, node_id, "llm")
    for kind in ("llm", "embedding", "any"):
        broker.publish(f"waiting {kind}", "", kind)
    fetched = broker.fetch("a", epoch, 20, ["llm", "embedding"])
    # b and c are level after c2; names decide then.
    assert fetched.jobs == ["waiting any", "waiting embedding", "waiting llm", "own", "c1", "c2", "c3", "b1"]
    assert broker.epochs.lengths() == {}


def test_a_fetch_gives_no_more_than_was_asked_for(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    for number in range(4):
        broker.publish(f"waiting {number}", "", "llm")
        broker.publish(f"own {number}", "a", "llm")
        broker.publish(f"peer {number}", "b", "llm")
    assert broker.fetch("a", epoch, 2, ["llm"]).jobs == ["waiting 0", "waiting 1"]
    assert broker.fetch("a", epoch, 3, ["llm"]).jobs == ["waiting 2", "waiting 3", "own 0"]
    assert broker.fetch("a", epoch, 4, ["llm"]).jobs == ["own 1", "own 2", "own 3", "peer 0"]
    assert broker.idle() == []
    assert broker.epochs.lengths() == {"node.b": 3}


@pytest.mark.parametrize("source", ["own", "waiting", "peer"])
def test_urgent_jobs_come_first_and_equals_in_their_order(broker: Broker, source: str) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    node_id = {"own": "a", "waiting": "", "peer": "b"}[source]
    for priority in (9, 3, 0, 6, 3, 0):
        broker.publish(f"{priority}-{len(broker.listed('node.b'))}", node_id, "llm", priority)
    assert [job[0] for job in broker.fetch("a", epoch, 6, ["llm"]).jobs] == list("003369")


def test_a_fetch_that_takes_from_a_peer_one_by_one_keeps_its_order(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    for number in range(5):
        broker.publish(str(number), "b", "llm")
    assert broker.fetch("a", epoch, 5, ["llm"]).jobs == list("01234")


def test_a_node_takes_nothing_from_a_peer_that_serves_more_than_it(broker: Broker) -> None:
    epoch = broker.open("narrow", "llm")
    broker.open("broad", "embedding", "llm")
    broker.publish("1", "broad", "llm")
    assert broker.fetch("narrow", epoch, serves=["llm"]).jobs == []
    assert broker.idle() == ["node.narrow"]


def test_names_of_types_are_compared_as_a_whole(broker: Broker) -> None:
    epoch = broker.open("a", "llm_large")
    broker.open("b", "llm")
    broker.publish("1", "b", "llm")
    assert broker.fetch("a", epoch, serves=["llm_large"]).jobs == []


def test_a_node_takes_nothing_from_waiting_lists_of_types_that_it_does_not_serve(broker: Broker) -> None:
    broker.publish("1", "", "embedding")
    assert broker.fetch("a", broker.open("a", "llm"), serves=["llm"]).jobs == []
    assert broker.waiting("embedding") == ["1"]


def test_a_peer_is_found_behind_a_page_of_longer_lists(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    for number in range(40):
        broker.open(f"other{number}", "embedding")
        for job in range(2):
            broker.publish(f"{number}/{job}", f"other{number}", "embedding")
    broker.open("z", "llm")
    broker.publish("found", "z", "llm")
    assert broker.fetch("a", epoch, 2, ["llm"]).jobs == ["found"]


def test_what_is_given_is_recorded_as_held_under_its_tag(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    for number in range(3):
        broker.publish(str(number), "a", "llm")
    fetched = broker.fetch("a", epoch, 3)
    assert broker.client.hgetall(broker.keys.unacked("a", epoch)) == {
        tag.encode(): message for tag, message in fetched.messages.items()
    }
    assert list(fetched.messages.values()) == [make_message(str(n), "llm") for n in range(3)]
    assert all(tag.startswith(f"{epoch}.1.") for tag in fetched.messages)


def tokens_of(fetched: Fetched) -> list[int]:
    return [int(tag.rpartition(".")[2]) for tag in fetched.messages]


def test_fencing_tokens_grow_from_delivery_to_delivery_on_all_nodes(broker: Broker) -> None:
    epochs = {node: broker.open(node, "llm") for node in ("a", "b")}
    tokens = []
    for number in range(6):
        broker.publish(str(number), request_type="llm")
        tokens += tokens_of(broker.fetch("ab"[number % 2], epochs["ab"[number % 2]], 2, serves=["llm"]))
    assert len(tokens) == 6
    assert tokens == sorted(set(tokens))


def test_a_clock_of_redis_that_is_set_back_lets_no_fencing_token_fall(broker: Broker) -> None:
    epoch, ahead = broker.open("a", "llm"), (int(time.time()) + 3600) * 1_000_000
    broker.client.set(broker.keys.fencing_token, ahead)
    broker.publish("1", "a", "llm")
    broker.publish("2", "a", "llm")
    assert tokens_of(broker.fetch("a", epoch, 2)) == [ahead + 1, ahead + 2]


def test_a_redis_that_lost_its_last_second_lets_no_fencing_token_fall(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("1", "a", "llm")
    (before,) = tokens_of(broker.fetch("a", epoch))
    broker.client.delete(broker.keys.fencing_token)
    broker.publish("2", "a", "llm")
    assert tokens_of(broker.fetch("a", epoch)) > [before]


def test_acknowledged_tags_are_forgotten_thousands_at_once(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.client.hset(broker.keys.unacked("a", epoch), mapping={f"t{n}": "x" for n in range(2500)} | {"stays": "x"})
    broker.fetch("a", epoch, acked=[f"t{n}" for n in range(2500)])
    assert broker.client.hkeys(broker.keys.unacked("a", epoch)) == [b"stays"]


@pytest.mark.parametrize("want", [0, 1])
def test_a_node_with_a_free_slot_left_idles_and_a_full_one_does_not(broker: Broker, want: int) -> None:
    epoch = broker.open("a", "llm")
    broker.fetch("a", epoch)
    assert broker.idle() == ["node.a"]
    broker.publish("1", "a", "llm")
    broker.fetch("a", epoch, want + 1)
    assert broker.idle() == (["node.a"] if want else [])


def test_a_fetch_for_no_slot_takes_nothing_and_leaves_the_index_alone(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("1", "a", "llm")
    broker.publish("2", "", "llm")
    assert broker.fetch("a", epoch, 0, ["llm"]).jobs == []
    assert broker.epochs.lengths() == {"node.a": 1, "waiting.llm": 1}
    assert broker.idle() == []


def test_a_node_idles_since_its_first_empty_fetch(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.client.zadd(broker.keys.idle, {"node.a": 5})
    broker.fetch("a", epoch)
    assert broker.client.zscore(broker.keys.idle, "node.a") == 5


def test_a_draining_node_gets_nothing_is_told_so_and_idles_no_longer(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("1", "a", "llm")
    tag = next(iter(broker.fetch("a", epoch, 2).messages))
    assert broker.idle() == ["node.a"]
    broker.publish("2", "a", "llm")
    broker.epochs.set_draining("a", True)
    fetched = broker.fetch("a", epoch, acked=[tag])
    assert (fetched.status, fetched.jobs, broker.idle()) == ("draining", [], [])
    assert broker.held("a", epoch) == []


@pytest.mark.parametrize("successor", [False, True])
def test_a_fenced_epoch_gets_nothing_is_told_so_and_does_not_idle(broker: Broker, successor: bool) -> None:
    epoch = broker.open("a", "llm")
    broker.epochs.fence("a", Beat(epoch, 0))
    if successor:
        broker.open("a", "llm")
        broker.publish("1", "a", "llm")
    broker.publish("2", "", "llm")
    fetched = broker.fetch("a", epoch, 5, ["llm"])
    assert (fetched.status, fetched.jobs, broker.idle()) == ("fenced", [], [])
    assert broker.held("a", epoch) == []


def test_an_entry_of_the_index_for_an_empty_list_goes_away(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.open("b", "llm")
    broker.client.zadd(broker.keys.backlog, {"node.a": 3, "node.b": 2, "waiting.llm": 1})
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == []
    assert broker.epochs.lengths() == {}


def test_own_jobs_are_found_even_where_the_index_does_not_know_them(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.client.lpush("node.a", make_message("1"))
    assert broker.fetch("a", epoch, 2).jobs == ["1"]
    assert broker.epochs.lengths() == {}


# open_epoch, beat, fence, set_draining


def test_an_epoch_is_opened_once(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    assert broker.epochs.open("a", ["llm"]) == Predecessor(Beat(epoch, 0))
    broker.epochs.beat("a", epoch)
    assert broker.epochs.open("a", ["llm"]) == Predecessor(Beat(epoch, 1))


def test_a_beat_tells_how_the_epoch_stands(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    assert broker.epochs.beat("a", epoch).standing is Standing.OK
    broker.epochs.set_draining("a", True)
    assert broker.epochs.beat("a", epoch).standing is Standing.DRAINING
    assert broker.epochs.beats() == {"a": Beat(epoch, 2)}
    assert broker.epochs.beat("a", "another").standing is Standing.FENCED
    assert broker.epochs.beats() == {"a": Beat(epoch, 2)}
    broker.epochs.fence("a", Beat(epoch, 2))
    assert broker.epochs.beat("a", epoch).standing is Standing.FENCED
    assert broker.epochs.beats() == {}


def test_a_node_that_was_lost_gets_jobs_when_it_has_beaten_as_often_as_it_must(broker: Broker) -> None:
    broker.epochs.fence("a", Beat(broker.open("a", "llm"), 0))
    epoch = broker.open("a", "llm", recovery_threshold=2)
    assert broker.publish("1", "a", "llm") == "waiting.llm"
    assert broker.fetch("a", epoch, serves=["llm"]).status == "limited"
    assert not broker.epochs.lists().may_get("node.a")
    broker.epochs.beat("a", epoch)
    assert broker.fetch("a", epoch, serves=["llm"]).status == "limited"
    broker.epochs.beat("a", epoch)
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == ["1"]
    assert broker.publish("2", "a", "llm") == "node.a"
    assert broker.epochs.lists().limits == {}


def test_a_node_that_left_in_good_order_gets_jobs_at_once_when_it_comes_back(broker: Broker) -> None:
    broker.epochs.close("a", broker.open("a", "llm"))
    broker.open("a", "llm", recovery_threshold=2)
    assert broker.publish("1", "a", "llm") == "node.a"


def test_what_is_bound_to_a_node_waits_there_until_it_has_recovered(broker: Broker) -> None:
    broker.epochs.fence("a", Beat(broker.open("a", "llm"), 0))
    epoch = broker.open("a", "llm", recovery_threshold=1)
    assert broker.put(make_message("1", "llm"), "node.a.bound") == "node.a.bound"
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == []
    broker.epochs.beat("a", epoch)
    assert broker.fetch("a", epoch, serves=["llm"]).jobs == ["1"]


def test_a_fence_puts_all_away_and_leaves_no_trace_of_the_node_but_that_it_was_lost(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    for priority in (0, 3, 6, 9):
        broker.publish(f"held {priority}", "a", "llm", priority)
    broker.fetch("a", epoch, 9)
    for priority in (0, 3, 6, 9):
        broker.publish(f"listed {priority}", "a", "llm", priority)
    broker.epochs.set_draining("a", True)
    assert broker.rings("a") == 1
    assert broker.epochs.fence("a", Beat(epoch, 0))
    keys = {key.decode() for key in broker.client.scan_iter()}
    remains = broker.keys.remains("a", epoch)
    assert keys == {
        broker.keys.counters,
        broker.keys.epoch_counter,
        broker.keys.fencing_token,
        broker.keys.opened,
        broker.keys.fenced,
        broker.keys.lost("a"),
        broker.keys.remains_unacked("a", epoch),
        *(remains + suffix for suffix in SUFFIXES),
    }
    assert broker.listed(remains) == [f"listed {priority}" for priority in (0, 3, 6, 9)]
    assert broker.epochs.fenced() == [("a", epoch, "lost", 4, 4)]


def test_a_fence_of_a_node_with_nothing_leaves_only_its_name(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    assert broker.epochs.fence("a", Beat(epoch, 0))
    assert broker.epochs.fenced() == [("a", epoch, "lost", 0, 0)]
    assert not broker.client.exists(broker.keys.remains_unacked("a", epoch), broker.keys.remains("a", epoch))


def test_a_node_that_has_beaten_since_is_not_fenced_unless_it_leaves(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.epochs.beat("a", epoch)
    assert not broker.epochs.fence("a", Beat(epoch, 0))
    assert not broker.epochs.fence("a", Beat("another", 1))
    assert broker.epochs.beats() == {"a": Beat(epoch, 1)}
    assert broker.epochs.close("a", epoch)
    assert not broker.epochs.close("a", epoch)


def test_draining_asks_for_an_epoch_that_stands(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    with pytest.raises(LookupError, match="no node 'b'"):
        broker.epochs.set_draining("b", True)
    with pytest.raises(LookupError):
        broker.epochs.set_draining("a", True, "earlier")
    assert broker.epochs.beat("a", epoch).standing is Standing.OK
    broker.epochs.set_draining("a", True, epoch)
    assert broker.epochs.beat("a", epoch).standing is Standing.DRAINING
    with pytest.raises(LookupError):
        broker.epochs.set_draining("a", False, "earlier")
    broker.epochs.set_draining("a", False, epoch)
    assert broker.epochs.beat("a", epoch).standing is Standing.OK


# move_held, move_listed, set_aside


def test_held_jobs_go_to_the_front_and_those_that_are_gone_are_passed_over(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("held", "a", "llm")
    ((tag, message),) = broker.fetch("a", epoch).messages.items()
    broker.publish("waits", "", "llm")
    moved = [("gone", replace_message(make_message("ghost", "llm"), broker.keys, delivered=True))]
    moved += [(tag, replace_message(message, broker.keys, delivered=True))]
    assert broker.move_held("a", epoch, moved) == 1
    assert broker.move_held("a", epoch, moved) == 0
    assert broker.waiting("llm") == ["held", "waits"]
    assert broker.held("a", epoch) == []
    assert broker.epochs.lengths() == {"waiting.llm": 2}


def test_a_suspect_reaches_the_node_that_alone_can_run_it(broker: Broker) -> None:
    # Among the suspects, a node that cannot would find it again, and give it back, without end.
    old = broker.open("old", "llm")
    broker.open("new", "llm")
    for queue in ("", "node.new", "node.new.bound"):
        broker.publish("job", "", "llm")
        ((tag, message),) = broker.fetch("old", old, serves=["llm"]).messages.items()
        placement = replace_message(message, broker.keys, delivered=True, queue=queue)
        broker.move_held("old", old, [(tag, placement)], Crash("old", old, "it died", 0.0))
        assert broker.listed("node.new.bound" if queue.endswith("bound") else "suspect.llm") == ["job"]
        broker.client.delete("suspect.llm", broker.keys.backlog)


def test_a_moved_list_stops_at_what_is_not_its_head(broker: Broker) -> None:
    broker.open("a", "llm")
    for number in range(4):
        broker.publish(str(number), "a", "llm")
    placements = [replace_message(make_message(n, "llm"), broker.keys, delivered=False) for n in ("0", "1", "x", "2")]
    assert broker.placer.move_listed("node.a", "node.a", placements, Why.DRAIN).run() == 2
    assert broker.placer.move_listed("node.a", "node.a", placements, Why.DRAIN).run() == 0
    assert (broker.listed("node.a"), broker.waiting("llm")) == (["2", "3"], ["0", "1"])
    assert broker.epochs.lengths() == {"node.a": 2, "waiting.llm": 2}


def counters(broker: Broker) -> dict[str, int]:
    found: Any = broker.client.hgetall(broker.keys.counters)
    return {text(name): int(number) for name, number in found.items()}


def test_what_is_moved_is_counted_by_the_reason_in_the_step_that_moves_it(broker: Broker) -> None:
    for node_id in ("a", "b"):
        broker.open(node_id, "llm")
    for number in range(3):
        broker.publish(str(number), "a", "llm")
    assert broker.evacuation.hand_over_unbound("a").listed == 3
    broker.publish("late", "a", "llm")
    broker.evacuation.hand_over("a")
    broker.evacuation.hand_over("a")
    assert counters(broker) == {"moved_ejection": 3, "moved_drain": 1}
    message = make_message("4", "llm")
    broker.put(message, "node.a")
    placement = replace_message(message, broker.keys, delivered=False, queue="node.b")
    for _ in range(2):
        broker.placer.move_newest("node.a", "node.a", 0, [placement])
    assert counters(broker)["moved_rebalance"] == 1


def test_a_node_that_is_lost_is_counted_once_and_so_is_what_it_was_at_work_on(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    for number in range(3):
        broker.publish(str(number), "a", "llm")
    first, *_ = broker.fetch("a", epoch, want=2).messages
    broker.placer.hold_back(broker.keys.unacked("a", epoch), broker.keys.not_started("a", epoch), [first])
    for _ in range(2):
        broker.epochs.fence("a", Beat(epoch, 0))
        broker.evacuation.move_remains(Remains("a", epoch, Crash("a", epoch, "it died", 0.0)))
    assert counters(broker) == {"nodes_lost": 1, "crash_deliveries": 1, "moved_failover": 3}


def test_jobs_of_nodes_that_die_together_keep_their_order(broker: Broker) -> None:
    names = [f"n{number}" for number in range(12)]
    for name in names:
        epoch = broker.open(name, "llm")
        for number in range(80):
            broker.publish(f"{name} {number}", name, "llm")
        broker.fetch(name, epoch, 40)
        broker.epochs.close(name, epoch)
    broker.evacuation.move_remains(*(Remains(name, epoch) for name, epoch, *_ in broker.epochs.fenced()))
    jobs = [job.split() for job in broker.waiting("llm")]
    assert {number for _, number in jobs[: 12 * 40]} == {str(number) for number in range(40)}, "held before listed"
    for name in names:
        assert [int(number) for other, number in jobs if other == name] == list(range(80))


@pytest.mark.parametrize("held", [8, 0])
def test_what_many_nodes_had_is_read_in_answers_that_redis_may_give(broker: Broker, held: int) -> None:
    # Of 160 messages of 32 KiB; redis.conf has such limits where clients are many.
    name = "client-output-buffer-limit"
    before = broker.client.config_get(name)[name]
    for number in range(20):
        epoch = broker.open(f"n{number}", "llm")
        for job in range(8):
            broker.put(make_message(f"{number}-{job}", "llm", filler="x" * 2**15), f"node.n{number}")
        broker.fetch(f"n{number}", epoch, held)
        broker.epochs.close(f"n{number}", epoch)
    broker.client.config_set(name, f"normal {4 * 2**20} 0 0")
    try:
        moved = broker.evacuation.move_remains(*(Remains(node, epoch) for node, epoch, *_ in broker.epochs.fenced()))
    finally:
        broker.client.config_set(name, before)
    assert (moved.held, moved.listed) == (20 * held, 20 * (8 - held))


def test_a_node_that_leaves_is_not_counted_as_lost(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.publish("job", "a", "llm")
    broker.epochs.close("a", epoch)
    broker.evacuation.move_remains(Remains("a", epoch))
    assert counters(broker) == {"moved_drain": 1}


def test_what_is_set_aside_leaves_its_list_and_the_index_once(broker: Broker) -> None:
    broker.open("a", "llm")
    broker.publish("1", "a")
    broker.client.lpush("node.a", "bad")
    broker.client.zincrby(broker.keys.backlog, 1, "node.a")
    for _ in range(2):
        broker.placer.set_aside_listed("node.a", "node.a", b"bad")
    assert (broker.listed("node.a"), broker.undecodable()) == (["1"], [b"bad"])
    assert broker.epochs.lengths() == {"node.a": 1}


def test_the_last_message_that_is_set_aside_takes_its_list_from_the_index(broker: Broker) -> None:
    broker.client.lpush("node.a", "bad")
    broker.client.zadd(broker.keys.backlog, {"node.a": 1})
    broker.placer.set_aside_listed("node.a", "node.a", b"bad")
    assert broker.epochs.lengths() == {}


def test_a_delivery_that_is_set_aside_leaves_its_hash_once(broker: Broker) -> None:
    broker.client.hset("hash", mapping={"1": "bad", "2": "good"})
    for _ in range(2):
        broker.placer.set_aside_held("hash", "1", b"bad")
    assert (broker.client.hgetall("hash"), broker.undecodable()) == ({b"2": b"good"}, [b"bad"])


def test_so_many_messages_are_kept_aside_and_the_oldest_go(broker: Broker) -> None:
    broker.client.rpush(broker.keys.undecodable, *map(str, range(UNDECODABLE_KEPT)))
    broker.client.hset("hash", "1", "bad")
    broker.placer.set_aside_held("hash", "1", b"bad")
    kept = broker.undecodable()
    assert (len(kept), kept[:2], kept[-1]) == (UNDECODABLE_KEPT, [b"bad", b"0"], str(UNDECODABLE_KEPT - 2).encode())


def test_what_is_no_delayed_job_keeps_no_node_from_its_work(broker: Broker) -> None:
    epoch = broker.open("a", "llm")
    broker.client.zadd(broker.keys.delayed, {"no entry": 1.0})
    broker.publish("1", "a", "llm")
    assert sorted(broker.fetch("a", epoch, 2, ["llm"]).jobs) == ["1", "no entry"]
    assert broker.epochs.lengths() == {}
    broker.client.zadd(broker.keys.delayed, {"no entry": 1.0})
    assert delayed_jobs(broker.client, broker.keys, 10) == []


# purge, queue_control, glance


def test_a_purge_empties_all_priorities_and_the_index(broker: Broker) -> None:
    broker.open("a", "llm")
    for priority in (0, 3, 6, 9, 9):
        broker.publish(str(priority), "a", "llm", priority)
    purge = load_script(broker.client, "cluster_tasks.broker", "purge")
    keys = [broker.keys.backlog, "node.a", *("node.a" + suffix for suffix in SUFFIXES)]
    assert (purge(keys), purge(keys)) == (5, 0)
    assert (broker.listed("node.a"), broker.epochs.lengths()) == ([], {})


def test_a_control_task_is_queued_unless_one_of_its_name_waits(broker: Broker) -> None:
    queue = load_script(broker.client, "cluster_tasks.broker", "queue_control")
    assert [queue(["control", "last check"], [f"check {n}"]) for n in range(3)] == [1, 0, 0]
    assert queue(["control", "last other"], ["other"]) == 1
    assert broker.client.rpop("control") == b"check 0"
    # Once taken it runs, or its holder has died: either way another may wait.
    assert [queue(["control", "last check"], [f"check {n}"]) for n in range(3, 5)] == [1, 0]
    assert broker.client.lrange("control", 0, -1) == [b"check 3", b"other"]


def test_a_glance_takes_the_first_message_of_the_first_list_that_has_one(broker: Broker) -> None:
    glance = load_script(broker.client, "cluster_tasks.broker", "glance")
    broker.client.lpush("second", "1", "2")
    assert glance(["first", "second"]) == [b"second", b"1"]
    assert glance(["first", "second"]) == [b"second", b"2"]
    assert glance(["first", "second"]) is None


def test_messages_pass_through_unchanged(broker: Broker) -> None:
    message = json.dumps(json.loads(make_message("1")) | {"empty": [], "large": 2**63 + 1, "text": "ü\x00"}).encode()
    broker.put(message)
    assert list(broker.fetch("a", broker.open("a")).messages.values()) == [message]
    assert job_of(message) == "1"
