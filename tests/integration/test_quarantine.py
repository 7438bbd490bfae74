"""What quarantine keeps, for how long, how much, and what leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cluster_tasks.broker.placement import Crash
from cluster_tasks.clock import SystemClock
from cluster_tasks.errors import ClusterError, JobNotFound
from cluster_tasks.failover.events import EventLog
from cluster_tasks.failover.quarantine import Quarantine
from tests.broker import Broker, make_message
from tests.waiting import wait_until

CRASHES = [Crash("a@test", "1-abc", "it was killed", 1.0, "Traceback: …"), Crash("b@test", "2-def", "it exited", 2.0)]
NewQuarantine = Callable[..., Quarantine]


@pytest.fixture
def new_quarantine(broker: Broker) -> NewQuarantine:
    return lambda ttl_s=3600.0, most=100: Quarantine(broker.client, broker.keys, SystemClock(), ttl_s, most)


def put(quarantine: Quarantine, *job_ids: str) -> None:
    for job_id in job_ids:
        quarantine.put(job_id, "jobs.work", make_message(job_id, "llm"), CRASHES)


def ids(quarantine: Quarantine) -> list[str]:
    return [kept.id for kept in quarantine.jobs()]


def test_a_record_holds_reason_traceback_and_the_history_of_nodes(new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one")
    kept = quarantine.get("one")
    assert kept.reason == "2 processes died while it ran, the last on b@test: it exited"
    assert kept.traceback == "Traceback: …"
    assert list(kept.crashes) == CRASHES
    assert kept.retry_of == ""


@pytest.mark.parametrize(
    "record",
    ["no JSON", "[]", "{}", '{"crashes": []}', '{"crashes": 3}', '{"crashes": [{}]}', "[" * 100_000],
)  # fmt: skip
def test_a_record_that_cannot_be_read_hides_no_other(
    record: str, broker: Broker, new_quarantine: NewQuarantine
) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one", "two")
    broker.client.hset(broker.keys.quarantine, "one", record)
    assert {job.id: job.reason for job in quarantine.jobs()}.keys() == {"one", "two"}
    assert (quarantine.get("one").reason, quarantine.get("one").retry_of) == ("its record cannot be read", "")
    with pytest.raises(ClusterError, match="job one cannot be sent again, for its record cannot be read: drop it"):
        quarantine.retry("one")
    quarantine.drop("one")
    assert quarantine.retry("two")


def test_what_newer_nodes_say_besides_is_left_out(broker: Broker, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one")
    record = json.loads(broker.client.hget(broker.keys.quarantine, "one") or "")
    for part in (record, record["crashes"][0]):
        part["of later"] = 1
    before = quarantine.get("one")
    broker.client.hset(broker.keys.quarantine, "one", json.dumps(record))
    assert quarantine.get("one") == before


def test_a_message_that_is_none_can_only_be_dropped(broker: Broker, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one")
    record = json.loads(broker.client.hget(broker.keys.quarantine, "one") or "")
    broker.client.hset(broker.keys.quarantine, "one", json.dumps({**record, "message": "[1]"}))
    assert quarantine.jobs()[0].retry_of == ""
    with pytest.raises(ClusterError, match="drop it"):
        quarantine.retry("one")


def test_beyond_its_size_the_oldest_go(new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine(most=2)
    put(quarantine, "one", "two", "three")
    assert ids(quarantine) == ["two", "three"]
    with pytest.raises(JobNotFound):
        quarantine.retry("one")


def test_a_job_that_is_kept_twice_counts_and_is_told_once(broker: Broker, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine(most=2)
    put(quarantine, "one", "two", "two", "two")
    assert ids(quarantine) == ["one", "two"]
    told = EventLog(broker.client, broker.keys, SystemClock()).latest()
    assert [(event.kind, event.facts["job"]) for event in told] == [
        ("job quarantined", "one"),
        ("job quarantined", "two"),
    ]


def test_what_was_kept_for_too_long_goes_and_leaves_nothing(broker: Broker, new_quarantine: NewQuarantine) -> None:
    put(new_quarantine(), "old")
    quarantine = new_quarantine(ttl_s=0.001)
    wait_until(lambda: quarantine.prune() or broker.client.keys("*") == [b"cluster:events"], message="it is forgotten")
    with pytest.raises(JobNotFound):
        quarantine.get("old")


def test_a_smaller_size_holds_for_what_is_there_already(new_quarantine: NewQuarantine) -> None:
    put(new_quarantine(), *map(str, range(10)))
    assert ids(new_quarantine(most=3)) == ["7", "8", "9"]


def test_a_retry_is_a_new_job_that_names_the_old(broker: Broker, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one", "two")
    new_id = quarantine.retry("one")
    message = json.loads(broker.client.lindex(broker.keys.waiting_queue("llm"), 0) or b"")
    assert (message["headers"]["id"], message["headers"]["retry_of"]) == (new_id, "one")
    assert message["properties"]["correlation_id"] == new_id
    assert ids(quarantine) == ["two"]
    quarantine.put(new_id, "jobs.work", json.dumps(message).encode(), CRASHES)
    assert quarantine.get(new_id).retry_of == "one"


def test_jobs_of_one_task_are_told_apart_from_others(new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one")
    quarantine.put("other", "jobs.other", make_message("other"), CRASHES)
    assert [kept.id for kept in quarantine.jobs("jobs.other")] == ["other"]


def test_what_was_dropped_leaves_nothing(broker: Broker, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "one")
    quarantine.drop("one")
    assert broker.client.keys("*") == [b"cluster:events"]
    with pytest.raises(JobNotFound):
        quarantine.drop("one")


@pytest.mark.parametrize("job_id", ["*", "a\nb", "[x]{y}", "%s%%", "'; return 1 --", "żółw 🐢", "a/b:c\x06\x163"])
def test_an_id_may_hold_any_character(job_id: str, new_quarantine: NewQuarantine) -> None:
    quarantine = new_quarantine()
    put(quarantine, "innocent", job_id)
    assert quarantine.get(job_id).id == job_id
    quarantine.drop(job_id)
    assert ids(quarantine) == ["innocent"]
