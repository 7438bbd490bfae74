"""``cluster-tasks ping``: the exit codes and the words that probes go by."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from celery.utils.nodenames import gethostname
from click.testing import CliRunner, Result

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.cli import ping as module
from cluster_tasks.cli.ping import ping
from tests.broker import Broker
from workers.redis_server import free_port

ROOT = Path(__file__).parents[2]
HEARTBEAT_S = 0.1


@pytest.fixture(autouse=True)
def _settings(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"BROKER_URL": redis_url, "HEARTBEAT_S": str(HEARTBEAT_S), "LEASE_S": "60", "HEALTH_CHECK_S": "0.1"}
    for name, value in own.items():
        monkeypatch.setenv(f"CLUSTER_{name}", value)


def asked(*words: str) -> Result:
    """Ask in this process."""
    return CliRunner().invoke(ping, words)


@contextmanager
def beating(epochs: EpochTable, node_id: str) -> Iterator[None]:
    """A node that beats."""
    epoch, ended = epochs.open(node_id, ["llm"]), Event()
    assert isinstance(epoch, str)

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            epochs.beat(node_id, epoch)

    thread = Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_settings_are_those_of_celeryconfig_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").write_text("cluster_max_qps = -1\n", encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-P", "-m", "cluster_tasks.cli.ping", "--node", "b"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert "cluster_max_qps" in told.stderr


def test_a_node_that_beats_and_takes_jobs_is_told_by_its_id_its_name_and_its_host(broker: Broker) -> None:
    here = f"b@{gethostname()}"
    with beating(broker.epochs, "a@host"), beating(broker.epochs, here):
        for given, node_id in (("a@host", "a@host"), ("a", "a@host"), ("b@%h", here)):
            done = asked("--node", given)
            assert (done.exit_code, done.output) == (0, f"{node_id} beats and takes jobs\n")


def test_a_node_that_drains_is_alive_and_not_ready(broker: Broker) -> None:
    with beating(broker.epochs, "a@host"):
        broker.epochs.set_draining("a@host", draining=True)
        assert (asked("--node", "a").exit_code, asked("--node", "a", "--alive").exit_code) == (3, 0)
        assert "a@host beats and is draining" in asked("--node", "a").stderr
        broker.epochs.set_draining("a@host", draining=False)
        assert asked("--node", "a").exit_code == 0


@pytest.mark.parametrize("alive", [(), ("--alive",)])
def test_a_node_that_does_not_beat_is_dead_whether_it_is_fenced_yet_or_not(
    broker: Broker, alive: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_LEASE_S", "1.5")
    epoch = broker.epochs.open("a@host", ["llm"])
    assert isinstance(epoch, str)
    done = asked("--node", "a@host", *alive)
    assert (done.exit_code, done.stderr.startswith("a@host does not beat")) == (1, True)
    assert broker.epochs.close("a@host", epoch)
    done = asked("--node", "a@host", *alive)
    assert done.exit_code == 1
    assert "no node 'a@host' is registered" in done.stderr
    assert "fenced" in done.stderr


def test_a_name_that_is_nearly_right_or_that_several_have_is_told(broker: Broker) -> None:
    for node_id in ("gpu@one", "gpu@two"):
        broker.epochs.open(node_id, ["llm"])
    assert "did you mean 'gpu@one'" in asked("--node", "gpu@on").stderr
    several = asked("--node", "gpu")
    assert (several.exit_code, "gpu@one, gpu@two" in several.stderr) == (1, True)
    assert (asked().exit_code, "--node" in asked().stderr) == (2, True)


def test_while_redis_is_away_nobody_is_ready_and_nobody_is_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    done = asked("--node", "a@host")
    assert (done.exit_code, "CLUSTER_BROKER_URL" in done.stderr) == (69, True)
    done = asked("--node", "a@host", "--alive")
    assert done.exit_code == 0
    assert "taken for alive" in done.output


def test_a_redis_that_takes_connections_and_never_answers_does_not_hold_a_probe_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BEYOND_LEASE_S", 0.0)
    monkeypatch.setenv("CLUSTER_LEASE_S", "1.5")
    with closing(socket.socket()) as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(100)
        monkeypatch.setenv("CLUSTER_BROKER_URL", f"redis://127.0.0.1:{hole.getsockname()[1]}/0")
        assert asked("--node", "a@host").exit_code == 69
        done = asked("--node", "a@host", "--alive")
    assert (done.exit_code, "no answer in 1.5 s" in done.output) == (0, True)


def test_the_command_asks_the_cluster_of_an_app_and_says_if_there_is_none(broker: Broker, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster_tasks.cli.main", "ping", "--node", "a@host", *words]
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)

    with beating(broker.epochs, "a@host"):
        assert (run().returncode, run("--app", "shop").returncode) == (0, 1)
        (tmp_path / "shop.py").write_text(
            "from celery import Celery\nfrom cluster_tasks import Cluster\napp = Celery('shop', set_as_current=False)\n"
            "app.conf.cluster_name = 'shops'\nCluster(app)\n"
        )
        other = run("--app", "shop")
    assert other.returncode == 1, "it is a node of another cluster"
    assert "no node 'a@host' is registered" in other.stderr
    assert "no Celery app 'nothing'" in run("--app", "nothing").stderr
