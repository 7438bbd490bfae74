"""Every example of docs/langchain.md, run as it stands with a model that calls tools, and what each prints."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster_tasks.testing import FakeOpenAI
from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.nodes import running
from workers.redis_server import RedisServer

GUIDE = (Path(__file__).parents[2] / "docs" / "langchain.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python[^\n]*\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
CALL = {"id": "1", "type": "function", "function": {"name": "opening_hours", "arguments": '{"place": "office"}'}}
TOLD = ["Answer from this:", "When do backups run?", "['nine to six']", "", "closes at six", "True"]
"""What each example prints, in part."""


def call_tools(body: Mapping[str, Any]) -> dict[str, Any] | None:
    return {"tool_calls": [CALL]} if body.get("tools") else None


def test_the_code_of_the_guide_runs(
    redis_server: RedisServer, new_worker: NewWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_CACHE_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_DATA_DIR", str(tmp_path / "collections"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeOpenAI(answer=call_tools) as provider:
        environ = {"CLUSTER_LLM_BASE_URL": provider.base_url, "CLUSTER_LLM_MODEL": "fake"}
        with running(new_worker("a", app="cluster_tasks", pool="threads", environ=environ)):
            for code, told in zip(PYTHON, TOLD, strict=True):
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, timeout=END_S,
                    check=False,
                )  # fmt: skip
                assert (done.returncode, done.stderr) == (0, ""), code
                assert told in done.stdout, code
