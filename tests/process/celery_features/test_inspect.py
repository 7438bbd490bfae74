"""What nodes tell when they are asked, and of their own accord."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster_tasks.keys import Keys
from tests.process.celery_features.conftest import END_S, Gate, Jobs
from tests.process.nodes import running
from tests.waiting import wait_until


def test_every_node_answers_a_ping(jobs: Jobs) -> None:
    assert jobs.inspect().ping() == {node: {"ok": "pong"} for node in jobs.node_ids}
    assert sorted(jobs.app.control.ping(timeout=END_S, limit=2), key=str) == sorted(
        ({node: {"ok": "pong"}} for node in jobs.node_ids), key=str
    )


def test_inspect_shows_what_runs_and_where(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name)
    jobs.wait_started(result)
    shown = {entry["id"]: node for node, entries in jobs.inspect().active().items() for entry in entries}
    gate.open()
    assert shown == {result.id: result.get(timeout=END_S)}


def test_inspect_shows_arguments_but_only_their_sizes_if_asked_to_be_safe(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name)
    jobs.wait_started(result)

    def shown(**options: bool) -> Any:
        (entry,) = [entry for entries in jobs.inspect().active(**options).values() for entry in entries]
        return entry["args"]

    assert shown() == [gate.name]
    assert shown(safe=True) == f"(<{len(gate.name)} characters>)"


def test_what_waits_in_a_list_is_not_reserved_by_a_node(jobs: Jobs, gate: Gate, busy: list[Any]) -> None:
    waiting = [jobs.echo.delay(number) for number in range(5)]
    reserved = {entry["id"] for entries in jobs.inspect().reserved().values() for entry in entries}
    assert not reserved & {result.id for result in waiting}
    listed = sum(jobs.cluster.epochs.lengths().values())
    assert listed == 5


def test_inspect_finds_a_job_by_its_id(jobs: Jobs, gate: Gate) -> None:
    result = jobs.hold.delay(gate.name)
    jobs.wait_started(result)
    found = {node: answer for node, answer in jobs.inspect().query_task(result.id).items() if answer}
    gate.open()
    node = result.get(timeout=END_S)
    state, told = found[node][result.id]
    assert (set(found), state, told["name"]) == ({node}, "active", "features.hold")


def test_inspect_shows_what_each_node_consumes(jobs: Jobs) -> None:
    shown = jobs.inspect().active_queues()
    keys = Keys()
    assert {node: {queue["name"] for queue in queues} for node, queues in shown.items()} == {
        node: {"celery", keys.node_queue(node)} for node in jobs.node_ids
    }


def test_inspect_shows_the_tasks_that_a_node_knows(jobs: Jobs) -> None:
    for names in jobs.inspect().registered().values():
        assert {"features.add", "features.plain_add"} <= {*names}


def test_inspect_shows_pool_broker_and_counts(jobs: Jobs) -> None:
    jobs.add.delay(1, 2).get(timeout=END_S)
    stats = jobs.inspect().stats()
    assert [told["pool"]["max-concurrency"] for told in stats.values()] == [2, 2]
    assert {told["broker"]["transport"] for told in stats.values()} == {"redis"}
    wait_until(
        lambda: sum(told["total"].get("features.add", 0) for told in jobs.inspect().stats().values()) >= 1, END_S
    )


def test_inspect_shows_settings_without_passwords(jobs: Jobs) -> None:
    for settings in jobs.inspect().conf().values():
        assert settings["worker_send_task_events"] is True


def test_inspect_report_and_clock_answer(jobs: Jobs) -> None:
    assert {*jobs.inspect().report()} == {*jobs.inspect().clock()} == {*jobs.node_ids}


@contextmanager
def captured(jobs: Jobs) -> Iterator[list[dict[str, Any]]]:
    """Collect the events of all nodes while the block runs."""
    events: list[dict[str, Any]] = []
    stop = threading.Event()

    def listen() -> None:
        with jobs.app.connection_for_read() as connection:
            receiver = jobs.app.events.Receiver(connection, handlers={"*": events.append})
            with receiver.consumer_context() as (listened, *_):
                while not stop.is_set():
                    with suppress(TimeoutError):
                        listened.drain_events(timeout=0.1)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        # Nodes send a heartbeat every two seconds: then the subscription stands.
        wait_until(lambda: events, END_S, "the first event comes")
        yield events
    finally:
        stop.set()
        thread.join(END_S)


def of_job(events: list[dict[str, Any]], job_id: str) -> list[str]:
    return [event["type"] for event in events if event.get("uuid") == job_id]


def test_events_tell_the_life_of_a_job(jobs: Jobs) -> None:
    with captured(jobs) as events:
        done, failed, retried = jobs.echo.delay("done"), jobs.fail.delay(), jobs.count_down.delay(1)
        with jobs.drained():
            revoked = jobs.echo.delay("revoked")
            jobs.command("revoke", task_id=revoked.id)
        lives = {
            done: ["task-received", "task-started", "task-succeeded"],
            failed: ["task-received", "task-started", "task-failed"],
            retried: ["task-received", "task-started", "task-retried"] + ["task-received", "task-started"]
            + ["task-succeeded"],
            revoked: ["task-revoked"],
        }  # fmt: skip
        for result, life in lives.items():
            wait_until(
                lambda result=result, life=life: sorted(of_job(events, result.id)) == sorted(life), END_S, str(life)
            )
    (received,) = [event for event in events if event["type"] == "task-received" and event["uuid"] == done.id]
    assert (received["name"], received["args"]) == ("features.echo", "(<4 characters>)")
    (succeeded,) = [event for event in events if event["type"] == "task-succeeded" and event["uuid"] == done.id]
    assert "done" not in succeeded["result"]


def test_events_tell_that_nodes_come_live_and_go(jobs: Jobs) -> None:
    with captured(jobs) as events:
        with running(jobs.new_node("visitor")) as (visitor,):
            wait_until(
                lambda: {"worker-online", "worker-heartbeat"}
                <= {event["type"] for event in events if event["hostname"] == visitor.id},
                END_S, "it is announced",
            )  # fmt: skip
        wait_until(
            lambda: ("worker-offline", visitor.id) in [(event["type"], event["hostname"]) for event in events],
            END_S, "its end is announced",
        )  # fmt: skip
