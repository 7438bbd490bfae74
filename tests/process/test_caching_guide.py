"""Every example of docs/caching.md, run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.jobs import make_jobs
from tests.process.nodes import running
from workers.redis_server import RedisServer

GUIDE = (Path(__file__).parents[2] / "docs" / "caching.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in re.findall(r"^```sh\n(celery.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]  # fmt: skip
TEXTS = ["first text", "second text"]


@pytest.fixture(autouse=True)
def _cache(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CLUSTER_CACHE_URL", redis_server.url)


def test_the_code_of_the_guide_computes_a_report_once() -> None:
    (code,) = PYTHON
    # In a process of its own, as it stands: it makes an app, which others would find as the current one.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=END_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    jobs = make_jobs()
    caches = jobs.cluster.caches
    assert caches.namespace("reports", tenant="acme").get("2026-11") == b"a report that takes a while"
    assert caches.sums()["values.computed"] == 1
    caches.close()
    jobs.app.close()


def test_the_commands_of_the_guide_do_what_they_say(new_worker: NewWorker, tmp_path: Path) -> None:
    jobs = make_jobs()
    caches = jobs.cluster.caches
    caches.namespace("reports").set_many({"KEY": b"its value", "report:7": b"", "other": b""})
    caches.namespace("reports", tenant="acme").set("KEY", b"")
    for name in ("answers", "embeddings", "search.manual"):
        caches.namespace(name).set("KEY", b"")
    caches.flush()
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "", TEXTS[0]]))
    told = []
    with running(new_worker("a", app="cluster_tasks")):
        for command in COMMANDS:
            done = subprocess.run(
                shlex.split(command), input="y\n", cwd=tmp_path, capture_output=True, text=True, timeout=END_S,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"},
            )  # fmt: skip
            assert done.returncode == 0, f"{command}: {done.stderr}"
            told.append(done.stdout)
    stats, value, deleted, cleared, *cleared_of_jobs, warmed = told
    assert cleared_of_jobs == ["1 cleared\n"] * 3
    tier, *numbers = next(line for line in stats.splitlines() if line.startswith("redis")).split()
    assert (tier, numbers[:2]) == ("redis", ["0", "0"]), "written, not read"
    assert re.fullmatch(r"9 bytes, \d+ s old, fresh for \d+ s\nits value\n", value)
    assert (deleted, cleared) == ("1 deleted\n", "1 cleared\n")
    assert warmed.endswith("2 texts: 0 were known, 2 were embedded\n")
    caches.close()
    jobs.app.close()
