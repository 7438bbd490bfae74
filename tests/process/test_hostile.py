"""Messages that a stranger, or a bug, puts into the lists of running nodes."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import states
from kombu.compression import compress

from cluster_tasks.errors import PayloadTooLarge
from tests.broker import make_message
from tests.process.accounts import END_S, held_key
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import WorkerProcess, running
from tests.waiting import wait_until

Change = Callable[[dict[str, Any]], object]
PICKLE = "application/x-python-serialize"


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def body(payload: Any) -> str:
    """A body as Celery encodes it."""
    return base64.b64encode(json.dumps(payload).encode()).decode()


def headers(**changed: Any) -> Change:
    return lambda message: message["headers"].update(changed)


def properties(**changed: Any) -> Change:
    return lambda message: message["properties"].update(changed)


def part(name: str, value: Any) -> Change:
    return lambda message: message.update({name: value})


def embedded(**changed: Any) -> Change:
    fields = {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **changed}
    return part("body", body([[], {}, fields]))


# What Celery's second protocol says, broken in one place each.
CHANGES: dict[str, Change] = {
    "no task": lambda message: message["headers"].pop("task"),
    "no id": lambda message: message["headers"].pop("id"),
    "no headers": lambda message: message.pop("headers"),
    "headers that are none": part("headers", None),
    "a list for headers": part("headers", [1, 2]),
    "no properties": lambda message: message.pop("properties"),
    "no delivery info": lambda message: message["properties"].pop("delivery_info"),
    "an unknown task": headers(task="no.such.task"),
    "a task that is a number": headers(task=5),
    "a task that is a list": headers(task=["jobs.work"]),
    "a task of many lines": headers(task="jobs.work\njobs.work"),
    "an id that is a mapping": headers(id={"a": 1}),
    "half a surrogate for an id": headers(id="\ud800"),
    "an empty id": headers(id=""),
    "words for a time limit": headers(timelimit=["a", "b"]),
    "one time limit": headers(timelimit=[1]),
    "a time limit that is no number": headers(timelimit=[float("nan"), None]),
    "words for retries": headers(retries="many"),
    "a list for a group": headers(group=[1], group_index="x"),
    "a bad eta": headers(eta="tomorrow"),
    "a number for an eta": headers(eta=5),
    "a bad expiry": headers(expires={"never": True}),
    "words for stamps": headers(stamped_headers="ab", stamps=7),
    "a nesting that is a text": headers(replaced_task_nesting="deep"),
    "a huge priority": properties(priority=10**400),
    "a priority that is a mapping": properties(priority={"high": 1}),
    "a body that is no base64": part("body", "%%%"),
    "a body that is no JSON": part("body", base64.b64encode(b"{{{").decode()),
    "a body that is a number": part("body", 7),
    "no body": lambda message: message.pop("body"),
    "a body of one part": part("body", body([1])),
    "arguments that are a number": part("body", body([5, {}, {}])),
    "named arguments that are a list": part("body", body([[], [1], {}])),
    "callbacks that are a number": embedded(callbacks=5),
    "a chain of numbers": embedded(chain=[1, 2]),
    "a chord that is a text": embedded(chord="all of it"),
    "a body nested too deeply": part("body", base64.b64encode(b"[" * 100_000 + b"]" * 100_000).decode()),
    "an unknown encoding": lambda message: message["properties"].update(body_encoding="rot13"),
    "an unknown content type": part("content-type", "application/x-nothing"),
    "a list for a content type": part("content-type", ["application/json"]),
    "an unknown character set": part("content-encoding", "klingon"),
    "an unknown compression": headers(compression="squeeze"),
    "a forged delivery": properties(cluster_delivery=5),
    "what follows nothing": properties(cluster_follows=5),
}  # fmt: skip

# No messages at all.
RAW = [
    b"", b"\xff\xfe\x00", b"hello", b"null", b"[]", b"5", b'"text"', b"{}", b'{"properties": 5}', b"{" * 10_000,
    b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"NaN", b"9" * 10_000,
]  # fmt: skip
STRANGE_IDS = ["*", "a\nb", "[x]{y}", "%s%%", "../../x", "'; return 1 --", "żółw 🐢", "a:b\x06\x163", "x" * 10_000]


@pytest.fixture(params=["prefork", "threads", "solo"])
def node(request: pytest.FixtureRequest, jobs: Jobs, new_worker: NewWorker) -> Iterator[WorkerProcess]:
    with running(new_worker("a", pool=request.param)) as (worker,):
        yield worker
        assert worker.exit_code() is None, worker.read_log()
        assert "node lost" not in [event.kind for event in jobs.cluster.events.latest(1_000)]


def push(jobs: Jobs, node: WorkerProcess, message: bytes | str) -> None:
    """As LPUSH from a terminal does: past all scripts."""
    jobs.cluster.client.lpush(jobs.cluster.keys.node_queue(node.id), message)


def sound(job_id: str, *args: Any) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(make_message(job_id, "llm"))
    message["headers"]["task"] = "jobs.work"
    message["body"] = body([args, {}, {}])
    return message


def broken(name: str) -> dict[str, Any]:
    message = sound(name)
    CHANGES[name](message)
    return message


def test_no_message_ends_a_node_or_keeps_it_from_its_work(
    jobs: Jobs, node: WorkerProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    bombs = []
    for number, content_type in enumerate((PICKLE, "pickle")):
        bomb = sound(f"bomb {number}")
        bomb["content-type"], bomb["content-encoding"] = content_type, "binary"
        bomb["body"] = base64.b64encode(pickle.dumps(([Bomb(tmp_path / "exploded")], {}, {}))).decode()
        bombs.append(bomb)
    for name in CHANGES:
        push(jobs, node, json.dumps(broken(name)))
    for bomb in bombs:
        push(jobs, node, json.dumps(bomb))
    for raw in RAW:
        push(jobs, node, raw)
    if "prefork" in request.node.name:
        # Its end is told by the main process, where a callback that is none must do no harm.
        late = sound("late")
        late["headers"]["timelimit"] = [1, None]
        late["body"] = body([[60], {}, {"errbacks": [5], "chain": [1], "callbacks": None, "chord": None}])
        push(jobs, node, json.dumps(late))
    client.zadd(keys.delayed, {b"no entry at all": 1.0, b"one\ntwo": 2.0})
    for strange in STRANGE_IDS:
        push(jobs, node, json.dumps(sound(strange)))
    # In a queue that is not ours, too.
    for name in ("words for a time limit", "a forged delivery", "a list for a content type"):
        client.lpush("celery", json.dumps(broken(name)))

    for strange in STRANGE_IDS:
        assert jobs.app.AsyncResult(strange).get(timeout=END_S) == node.id
    assert jobs.work.delay().get(timeout=END_S) == node.id
    assert jobs.plain.delay(1).get(timeout=END_S) == 2
    wait_until(lambda: not client.hlen(held_key(jobs, node.id)), END_S, "nothing is held for ever")
    assert not (tmp_path / "exploded").exists()
    if "prefork" in request.node.name:
        assert jobs.app.AsyncResult("late").state == states.FAILURE
    kept = set(jobs.cluster.undecodable(1_000))
    lost = [raw for raw in [*RAW, b"no entry at all", b"one\ntwo"] if raw and raw not in kept]
    assert not lost
    failed, ran = states.FAILURE, states.SUCCESS
    ends = {name: jobs.app.AsyncResult(name).state for name in CHANGES if json.dumps(broken(name)).encode() not in kept}
    harmless = {"no delivery info", "a huge priority", "a priority that is a mapping", "a forged delivery"}
    harmless |= {"what follows nothing", "a chord that is a text", "an unknown character set"}
    assert {name for name, end in ends.items() if end not in (failed, ran)} == set()
    assert {name for name, end in ends.items() if end == ran} <= harmless
    assert [jobs.app.AsyncResult(f"bomb {number}").state for number in (0, 1)] == [failed, failed]


# In other queues Kombu itself keeps what it reads by these.
FOREIGN: dict[str, Change] = {
    "no properties": CHANGES["no properties"],
    "no delivery info": CHANGES["no delivery info"],
    "a list for a delivery info": properties(delivery_info=[]),
    "a delivery info without an exchange": properties(delivery_info={"routing_key": "celery"}),
    "no delivery tag": lambda message: message["properties"].pop("delivery_tag"),
    "a mapping for a delivery tag": properties(delivery_tag={}),
    "half a surrogate for a delivery tag": properties(delivery_tag="\ud800"),
    "a list for headers": CHANGES["a list for headers"],
    "a body that is no base64": part("body", "a"),
    "an unknown encoding": properties(body_encoding="rot13"),
}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_no_message_in_another_queue_ends_a_node(pool: str, jobs: Jobs, new_worker: NewWorker) -> None:
    strangers = [raw for raw in RAW if raw]
    for change in FOREIGN.values():
        message = sound("foreign")
        change(message)
        strangers.append(json.dumps(message).encode())
    with running(new_worker("a", pool=pool)) as (node,):
        for stranger in strangers:
            jobs.cluster.client.lpush("celery", stranger)
        assert jobs.plain.delay(1).get(timeout=END_S) == 2
        assert jobs.work.delay().get(timeout=END_S) == node.id
        assert set(jobs.cluster.undecodable(1_000)) == set(strangers)
        assert node.exit_code() is None


def test_a_message_of_another_queue_that_calls_itself_a_delivery_is_none(jobs: Jobs, new_worker: NewWorker) -> None:
    client = jobs.cluster.client
    with running(new_worker("a", pool="threads")) as (node,):
        # Of nobody, and of one that stands and is another job's.
        for tag in ("1-x.1.1", f"{jobs.cluster.epochs.beats()[node.id].epoch}.1.1"):
            message = sound(tag)
            message["properties"]["cluster_delivery"] = [node.id, tag.partition(".")[0], tag]
            client.lpush("celery", json.dumps(message))
            assert jobs.app.AsyncResult(tag).get(timeout=END_S) == node.id
        wait_until(lambda: not client.exists("unacked"), END_S, "they are acknowledged")
        assert jobs.cluster.stale_commits() == 0


def test_no_message_ends_a_coordinator(jobs: Jobs, tmp_path: Path) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    command = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "coordinator", "-n", "chief@test"]
    with (tmp_path / "chief.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as chief:
        try:
            wait_until(jobs.cluster.checks_done, END_S, "it checks")
            client.lpush(keys.control_queue, *filter(None, RAW))
            wait_until(lambda: set(jobs.cluster.undecodable(1_000)) == set(filter(None, RAW)), END_S, "all are kept")
            done = jobs.cluster.checks_done()
            wait_until(lambda: jobs.cluster.checks_done() > done, END_S, "it goes on")
            assert chief.poll() is None
        finally:
            chief.terminate()


def bomb(jobs: Jobs, compression: str) -> dict[str, Any]:
    """A small message with a body that is too large when it is unpacked."""
    whole = json.dumps([[0.0, "x" * jobs.cluster.settings.max_message_bytes], {}, {}])
    packed, content_type = compress(whole, compression)
    message = sound(f"bomb of {compression}")
    message["headers"]["compression"] = content_type
    message["body"] = base64.b64encode(packed).decode()
    return message


def test_what_would_be_too_large_when_it_is_unpacked_is_kept_and_not_unpacked(
    jobs: Jobs, new_worker: NewWorker
) -> None:
    with running(new_worker("a", pool="threads")) as (node,):
        bombs = [json.dumps(bomb(jobs, compression)) for compression in ("zlib", "bzip2", "lzma")]
        for each in bombs:
            push(jobs, node, each)
        assert jobs.work.apply_async((0.0, "x" * 100_000), compression="zlib").get(timeout=END_S) == node.id
        wait_until(lambda: len(jobs.cluster.undecodable(10)) == len(bombs), END_S, "all are kept")
        assert {kept.decode() for kept in jobs.cluster.undecodable(10)} == set(bombs)
        assert node.exit_code() is None


def test_a_job_that_is_too_large_is_refused_in_its_caller(jobs: Jobs) -> None:
    client = jobs.cluster.client
    limit = jobs.cluster.settings.max_message_bytes
    before = client.dbsize()
    with pytest.raises(PayloadTooLarge, match=rf"a job of jobs.work has \d+ bytes and may have {limit}"):
        jobs.work.delay(key="x" * limit)
    with pytest.raises(PayloadTooLarge):
        jobs.work.apply_async(kwargs={"key": "x" * limit}, countdown=60)
    with pytest.raises(PayloadTooLarge):
        jobs.work.apply_async(kwargs={"key": "x" * limit}, compression="zlib")
    assert client.dbsize() == before
