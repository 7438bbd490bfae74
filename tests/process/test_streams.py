"""The text of a job whose node dies while it is made, or is taken for dead and goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster_tasks.redis_store import text
from cluster_tasks.streaming.entries import Entry
from cluster_tasks.tasks import llm, stream
from cluster_tasks.tasks.streams import Chunk, Finished, Restarted, TextStream
from cluster_tasks.testing import CHAT_PATH, FakeOpenAI
from tests.process.accounts import END_S, held_key, wait_until_nothing_is_left
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import WorkerProcess, running

DECLARED = llm
"""An app knows the jobs of the modules that its process has imported."""
OLD, NEW = "alpha beta gamma delta epsilon", "one two three four five"


@pytest.fixture
def provider() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def workers(provider: FakeOpenAI, new_worker: NewWorker) -> Iterator[tuple[WorkerProcess, ...]]:
    environ = {"CLUSTER_LLM_BASE_URL": provider.base_url, "CLUSTER_LLM_MODEL": "fake", "NO_PROXY": "127.0.0.1"}
    with running(*(new_worker(name, app="cluster_tasks", environ=environ) for name in "ab")) as started:
        yield started


def holder(jobs: Jobs, workers: tuple[WorkerProcess, ...]) -> WorkerProcess:
    """The node that has the only job."""
    (found,) = (each for each in workers if jobs.cluster.client.hlen(held_key(jobs, each.id)))
    return found


def begin(jobs: Jobs) -> tuple[TextStream, Iterator[Any], Chunk]:
    """Send a job, and read the beginning of its text, which comes in one piece or in two."""
    tokens = stream(jobs.app.tasks["llm.generate"], prompt="Say something.", timeout_s=END_S)
    coming = tokens.events()
    first = next(coming)
    assert isinstance(first, Chunk)
    assert OLD.startswith(first.text)
    return tokens, coming, first


def after_restart(events: list[Any]) -> str:
    """The text that follows the only restart, before which there is nothing but the beginning of the old one."""
    (place,) = (number for number, event in enumerate(events) if isinstance(event, Restarted))
    assert OLD.startswith("".join(event.text for event in events[:place]))
    return "".join(event.text for event in events[place:] if isinstance(event, Chunk))


def test_a_node_that_is_killed_while_it_says_something_is_followed_by_another_from_the_beginning(
    jobs: Jobs, provider: FakeOpenAI, workers: tuple[WorkerProcess, ...]
) -> None:
    provider.reply(OLD)
    provider.reply(NEW)
    provider.hang(events=3)
    tokens, coming, first = begin(jobs)
    holder(jobs, workers).kill()
    events = [first, *coming]
    assert after_restart(events) == NEW
    assert isinstance(events[-1], Finished)
    assert events[-1].result == tokens.job.get(timeout=END_S)
    assert events[-1].result["text"] == NEW
    assert provider.counts[CHAT_PATH] == 2
    wait_until_nothing_is_left(jobs)


def test_a_node_that_was_taken_for_dead_says_no_more_beside_the_one_that_took_over(
    jobs: Jobs, provider: FakeOpenAI, workers: tuple[WorkerProcess, ...]
) -> None:
    provider.reply(OLD)
    provider.reply(NEW)
    provider.hang(times=2, events=3)
    tokens, coming, first = begin(jobs)
    stale = holder(jobs, workers)
    # Its child goes on, and has the provider's connection.
    stale.signal(signal.SIGSTOP)
    events = [first, next(coming), next(coming)]
    while not isinstance(events[-2], Restarted):
        events.append(next(coming))
    provider.release()
    events += coming
    assert after_restart(events) == NEW
    assert tokens.result["text"] == NEW
    written: Any = jobs.cluster.client.xrange(jobs.cluster.keys.stream(tokens.job.id))
    tokens_of = {text(entry_id).partition("-")[0] for entry_id, fields in written}
    assert len(tokens_of) == 2
    old = "".join(Entry.read(fields).text for entry_id, fields in written if text(entry_id).startswith(min(tokens_of)))
    assert old == "alpha beta ", "it was fenced before it could say more"
    stale.signal(signal.SIGCONT)
    wait_until_nothing_is_left(jobs)
