"""Alerts of a whole cluster, which a webhook gets once, with a coordinator and without one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.process.accounts import END_S
from tests.process.conftest import NewWorker
from tests.process.jobs import Jobs
from tests.process.nodes import running
from tests.waiting import wait_until
from tests.webhook import Hook, serving

COORDINATOR = [sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "coordinator", "-n", "chief@test"]


def test_each_alert_of_a_cluster_arrives_once(
    jobs: Jobs, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(Hook()) as hook, (tmp_path / "chief.log").open("wb") as log:
        monkeypatch.setenv("CLUSTER_ALERT_URL", hook.url)
        # Two that die together are to look so, and nobody else dead, on a machine that is late.
        patient = {"CLUSTER_HEARTBEAT_S": "0.5", "CLUSTER_LEASE_S": "6"}
        for name, value in patient.items():
            monkeypatch.setenv(name, value)
        environ = {"CLUSTER_ALERT_URL": hook.url, "CLUSTER_ALERT_SECRET": "a secret", **patient}
        nodes = [new_worker(name, slots=1, environ=environ) for name in "abc"]
        with running(*nodes) as (first, second, left):
            poison = jobs.fatal.delay()
            wait_until(lambda: "job quarantined" in hook.kinds(), END_S, "a job is quarantined")
            for doomed in (first, second):
                doomed.signal(signal.SIGKILL)
            for doomed in (first, second):
                doomed.kill()
            wait_until(lambda: hook.kinds().count("node lost") == 2, END_S, "two nodes are lost")
            wait_until(lambda: "no coordinator" in hook.kinds(), END_S, "nobody coordinates")
            with subprocess.Popen(COORDINATOR, stdout=log, stderr=log) as chief:
                wait_until(lambda: "coordinator back" in hook.kinds(), END_S, "somebody does")
                left.kill()
                wait_until(lambda: hook.kinds().count("node lost") == 3, END_S, "the last node is lost")
                chief.terminate()
        # At least once is what is promised: on a busy machine an answer can come too late.
        counted = Counter({each["id"]: each["kind"] for each in hook.taken}.values())
        assert (counted["job quarantined"], counted["node lost"]) == (1, 3)
        assert counted.keys() - {"panic guard over"} == {
            "job quarantined", "node lost", "panic guard", "no coordinator", "coordinator back",
        }  # fmt: skip
        assert next(each["facts"]["job"] for each in hook.taken if each["kind"] == "job quarantined") == poison.id
        assert all("x-cluster-signature" in headers for headers, _ in hook.requests[:3])
        logs = [(tmp_path / "chief.log").read_text(), *(node.read_log() for node in nodes)]
        assert not any("hidden" in log or "a secret" in log for log in logs), "the key of the URL is in a log"
