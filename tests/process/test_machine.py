"""``cluster-tasks``: a whole cluster on this machine, and the demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until

START_S = 90.0
KEYS = {
    "jobs", "succeeded", "failed", "lost", "executed_twice", "committed_twice", "killed_node", "held_by_killed_node",
    "detected_after_s", "reowned_after_s", "throughput_per_s", "latency_p50_s", "latency_p99_s", "jobs_by_node",
    "strategy",
}  # fmt: skip


@pytest.mark.timeout(300)
def test_the_demo_keeps_its_promises_and_says_so_in_one_json_object(redis_binary: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "demo", "--json"]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert set(told) == KEYS
    assert told["jobs"] == told["succeeded"] >= 600
    assert (told["failed"], told["lost"], told["committed_twice"]) == (0, 0, 0)
    assert told["held_by_killed_node"] > 0


@contextmanager
def up(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``cluster-tasks up`` with two nodes and without Flower, started and ready."""
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "up", "--nodes", "2", "--no-flower", "--pool", "solo"]
    log = directory / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--data-dir", str(directory)], stdout=output, stderr=output)
    try:
        wait_until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, START_S, "up starts")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(START_S)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind_by_up(end: signal.Signals, redis_binary: str, tmp_path: Path) -> None:
    with up(tmp_path) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4
        process.send_signal(end)
        process.wait(START_S)
        _, alive = psutil.wait_procs(family, timeout=START_S)
        assert not alive


@pytest.mark.timeout(240)
def test_up_restarts_a_node_that_dies(redis_binary: str, tmp_path: Path) -> None:
    with up(tmp_path) as process:

        def node() -> psutil.Process | None:
            for member in psutil.Process(process.pid).children(recursive=True):
                try:
                    if any(word.startswith("node1@") for word in member.cmdline()):
                        return member
                except psutil.NoSuchProcess:  # It died since it was listed.
                    continue
            return None

        first = wait_until(node, START_S, "node1 runs")
        first.kill()
        wait_until(lambda: (now := node()) is not None and now.pid != first.pid, START_S, "node1 runs again")
