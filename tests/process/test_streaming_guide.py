"""The web server of docs/streaming.md and a browser: what it is sent, loses, and goes on with."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from cluster_tasks.testing import FakeOpenAI
from tests.guides import ROOT, blocks_of
from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.nodes import running
from workers.redis_server import RedisServer

BLOCKS = blocks_of(ROOT / "docs/streaming.md")
SSE = next(block.text for block in BLOCKS if block.options.get("title") == "answers.py")
SAID = "one two three four five six seven eight"


@pytest.fixture
def provider() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture(autouse=True)
def _node(
    redis_server: RedisServer, provider: FakeOpenAI, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    environ = {"CLUSTER_LLM_BASE_URL": provider.base_url, "CLUSTER_LLM_MODEL": "fake"}
    with running(new_worker("a", app="cluster_tasks", pool="threads", environ=environ)):
        yield


@pytest.fixture
def url() -> Iterator[str]:
    """Of the web server of the guide."""
    command = [sys.executable, "-c", SSE, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().partition("?")[0]
        server.terminate()


def asked(url: str, last_event_id: str = "") -> Any:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=END_S)


def events(lines: Any) -> Iterator[tuple[str, Any, str]]:
    """Read events as a browser does."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        else:
            yield fields["event"], json.loads(fields["data"]), fields.get("id", "")
            fields = {}


def test_a_browser_reads_an_answer_loses_its_connection_and_goes_on(url: str, provider: FakeOpenAI) -> None:
    provider.hang(events=4)
    with asked(f"{url}?prompt={quote(SAID)}") as response:
        kind, text, place = next(events(response))
    assert kind == "text"
    provider.release()
    with asked(url, place) as response:
        rest = list(events(response))
    assert text + "".join(data for kind, data, _ in rest if kind == "text") == SAID
    assert rest[-1][:2] == ("done", {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16})
    with asked(url, rest[-1][2]) as response:
        assert [kind for kind, _, _ in events(response)] == ["done"]


def test_a_browser_is_told_what_has_failed(url: str, provider: FakeOpenAI) -> None:
    provider.fail(400, message="refused")
    with asked(f"{url}?prompt=x") as response:
        ((kind, data, _),) = events(response)
    assert kind == "failed"
    assert "refused" in data
    with pytest.raises(urllib.error.HTTPError, match="400"):
        asked(url)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        asked(url, "a-job/no-place")
