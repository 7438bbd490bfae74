"""``cluster-tasks``: a whole cluster on this machine, and the demo."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from celery import Celery

from cluster_tasks import Cluster, NodeFilter, NodeRole, NodeStatus
from cluster_tasks.errors import BrokerUnavailable, ClusterError
from cluster_tasks.tasks import embed
from tests.process.accounts import finish, starts_of, wait_until_nothing_is_left
from tests.process.jobs import Jobs, make_jobs
from tests.waiting import wait_until
from workers.redis_server import free_port
from workers.rolling import RollingRestart
from workers.supervision import RUNNING, SupervisorClient

START_S = 180.0
PASSWORD = "of:Flower%40"
KEYS = {
    "jobs", "succeeded", "failed", "lost", "executed_twice", "committed_twice", "killed_node", "held_by_killed_node",
    "detected_after_s", "reowned_after_s", "throughput_per_s", "latency_p50_s", "latency_p99_s", "jobs_by_node",
    "strategy", "repetition",
}  # fmt: skip


@pytest.mark.timeout(600)
def test_the_demo_keeps_its_promises_and_says_so_in_one_json_object(redis_binary: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "demo", "--json"]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert set(told) == KEYS
    assert told["jobs"] == told["succeeded"] >= 600
    assert (told["failed"], told["lost"], told["committed_twice"]) == (0, 0, 0)
    assert told["held_by_killed_node"] > 0
    assert told["repetition"]["second_per_s"] > 2 * told["repetition"]["first_per_s"]


@pytest.mark.timeout(240)
def test_a_job_whose_node_could_not_note_its_end_any_more_is_not_waited_for(redis_binary: str, tmp_path: Path) -> None:
    # Nothing is noted: these nodes run without the demo's audit.
    script = (
        "import sys, pathlib, rich.console; from workers.demo import story; from workers.demo.corpus import Passage\n"
        "from workers.local import LocalCluster, Plan\n"
        "story.STILL_S = float('inf')\n"
        "passages = [Passage(f'passage {number} of a few', 'here') for number in range(8)]\n"
        "with LocalCluster(Plan(pathlib.Path(sys.argv[1]), nodes=1, cache=False)) as local:\n"
        "    local.wait_for_all()\n"
        "    story.Story(local, rich.console.Console()).index(passages)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=200)
    assert b"8 passages are indexed" in done.stdout, done.stderr.decode()


@pytest.mark.parametrize("folder", ["/proc/nowhere", __file__])
def test_a_folder_that_cannot_hold_a_cluster_is_named(folder: str, redis_binary: str) -> None:
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "up", "--no-flower", "--data-dir", folder]
    done = subprocess.run(command, capture_output=True, timeout=START_S, text=True)
    assert done.returncode == 1
    assert f"--data-dir {folder} cannot be used" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@contextmanager
def up(directory: Path, *options: str, nodes: int | None = 2) -> Iterator[subprocess.Popen[bytes]]:
    """``cluster-tasks up`` with so many nodes, without Flower if nothing is said of it, started and ready."""
    command = [sys.executable, "-m", "cluster_tasks.cli.main", "up", "--pool", "solo"]
    command += ["--nodes", str(nodes)] if nodes else []
    command += options if "--flower-port" in options else [*options, "--no-flower"]
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
def test_a_terminal_that_closes_lets_jobs_end_though_shell_and_kernel_both_tell_of_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    with up(tmp_path, "--app", "tests.process.jobs", "--pool", "threads", nodes=1) as process:
        job = jobs.work.delay(4)
        wait_until(lambda: starts_of(jobs, [job])[job.id], START_S, "it runs")
        process.send_signal(signal.SIGHUP)
        threading.Event().wait(0.1)
        process.send_signal(signal.SIGHUP)
        process.wait(START_S)
    assert job.state == "SUCCESS"
    wait_until_nothing_is_left(jobs)


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


@pytest.mark.timeout(240)
def test_flower_shows_every_node_with_its_list_and_its_jobs(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER_FLOWER_PASSWORD", PASSWORD)
    port = free_port()

    def get(path: str, password: str = PASSWORD) -> str:
        login = base64.b64encode(f"cluster:{password}".encode()).decode()
        asked = Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Basic {login}"})
        try:
            with urlopen(asked, timeout=10) as answer:
                return str(answer.read().decode())
        except HTTPError as exc:
            return f"refused: {exc.code}" if exc.code == 401 else ""
        except OSError:
            return ""

    with up(tmp_path, "--flower-port", str(port)) as process:
        wait_until(lambda: get("/api/tasks").startswith("{"), START_S, "Flower answers")
        assert [get(path, "wrong") for path in ("/", "/api/tasks", "/broker")] == ["refused: 401"] * 3
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert not any(PASSWORD in word for member in family for word in member.cmdline())
        heard = [each.laddr for member in family for each in member.net_connections() if each.status == "LISTEN"]
        assert {address.ip for address in heard} == {"127.0.0.1"}
        assert {port, int(broker_url_of(tmp_path).rpartition(":")[2].partition("/")[0])} <= {
            each.port for each in heard
        }
        # The ready-made app would keep the address it was first used with.
        with Celery("caller", set_as_current=False, broker=broker_url_of(tmp_path)) as app:
            cluster = Cluster(app)
            job = app.tasks[embed.name].delay("some text")
            assert job.get(timeout=START_S)["dimension"]
            nodes = sorted(node.id for node in cluster.nodes(NodeFilter(role=NodeRole.WORKER)))
        tasks = wait_until(lambda: (seen := json.loads(get("/api/tasks") or "{}")).get(job.id) and seen, START_S)
        assert {task["name"] for task in tasks.values()} == {"embedding.embed"}, "jobs only, no health checks"
        assert "some text" not in json.dumps(tasks)
        workers = wait_until(
            lambda: (seen := json.loads(get("/api/workers?refresh=1") or "{}")).keys() >= set(nodes)
            # Flower asks for each thing by itself, and waits a second.
            and all("active_queues" in seen[node] for node in nodes) and seen, START_S
        )  # fmt: skip
        consumed = {queue["name"] for node in nodes for queue in workers[node]["active_queues"]}
        assert consumed == {"celery", *map(cluster.keys.node_queue, nodes)}
        lengths = {queue["name"]: queue["messages"] for queue in json.loads(get("/api/queues/length"))["active_queues"]}
        assert [lengths[cluster.keys.node_queue(node)] for node in nodes] == [0, 0]
        page = get("/broker")
        assert all(cluster.keys.node_queue(node) in page for node in nodes)
        assert 'href="/cluster"' in page
        assert {*nodes} < {node["id"] for node in json.loads(get("/cluster/snapshot"))["nodes"]}
        assert get("/cluster/snapshot", "wrong") == "refused: 401"


@pytest.mark.timeout(300)
def test_a_rolling_restart_under_load_loses_and_charges_nothing_and_keeps_all_nodes_but_one(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with up(tmp_path, "--app", "tests.process.jobs", "--pool", "prefork"):
        monkeypatch.setenv("CLUSTER_BROKER_URL", broker_url_of(tmp_path))
        jobs = make_jobs()
        cluster, results, fewest = jobs.cluster, [jobs.stubborn.delay()], 2
        names = {node.id: node.epoch for node in cluster.nodes()}
        wait_until(lambda: starts_of(jobs, results)[results[0].id], START_S, "one runs that will not end in time")
        command = [*(sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "restart", "--rolling")]
        command += ["--data-dir", str(tmp_path), "--timeout", "1", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as restarting:
            while restarting.poll() is None:
                results.append(jobs.work.delay(0.2, key=str(len(results))))
                online = [node for node in cluster.nodes(NodeFilter(role=NodeRole.WORKER))
                          if node.status in (NodeStatus.ONLINE, NodeStatus.BUSY)]  # fmt: skip
                fewest = min(fewest, len(online))
                threading.Event().wait(0.2)  # Less than the one that is left can do.
            told, errors = restarting.communicate()
        assert restarting.returncode == 0, errors.decode()
        done = {each["node"]: each for each in map(json.loads, told.splitlines())}
        assert [name.partition("@")[0] for name in done] == ["node1", "node2", "coordinator"]
        now = {node.id: node.epoch for node in cluster.nodes()}
        assert names.keys() == now.keys()
        assert not names.items() & now.items(), "each has a new epoch"
        assert {name: each["epoch"] for name, each in done.items()} == now
        assert fewest == 1
        assert sum(finish(results).values()) == len(results)
        assert sum(starts_of(jobs, results).values()) == len(results) + sum(
            each["handed_back"] for each in done.values()
        )
        kinds = [event.kind for event in cluster.events.latest(1000)]
        assert (kinds.count("node restarted"), kinds.count("node lost")) == (3, 0)
        wait_until_nothing_is_left(jobs)

        # No time to come back: the rest is left as it is.
        impatient = RollingRestart(cluster, tmp_path, drain_timeout_s=1, start_timeout_s=0.1)
        with pytest.raises(ClusterError, match=r"node1 is not back after 0.1 s.*node1.log"):
            impatient.run(lambda _: None)
        assert cluster.epochs.beats()[next(name for name in now if "node2" in name)].epoch in now.values()
        jobs.app.close()


@pytest.mark.timeout(240)
def test_a_rolling_restart_that_is_ended_leaves_no_node_drained_or_stopped(
    redis_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*(sys.executable, "-m", "celery", "-A", "tests.process.jobs", "cluster", "restart", "--rolling")]
    command += ["--data-dir", str(tmp_path)]
    with up(tmp_path, "--app", "tests.process.jobs", "--pool", "threads", "--nodes", "1"):
        monkeypatch.setenv("CLUSTER_BROKER_URL", broker_url_of(tmp_path))
        jobs = make_jobs()
        cluster, supervisor = jobs.cluster, SupervisorClient(tmp_path)

        def is_at_work() -> bool:
            nodes = cluster.nodes(NodeFilter(role=NodeRole.WORKER))
            return [node.status for node in nodes] == [NodeStatus.ONLINE] and not cluster.epochs.lists().draining

        def end(during: Callable[[], object], number: signal.Signals, timeout_s: float) -> None:
            wait_until(is_at_work, START_S, "the node is at work")
            with subprocess.Popen([*command, "--timeout", str(timeout_s)], stderr=subprocess.DEVNULL) as restarting:
                wait_until(during, START_S, "it is at it")
                restarting.send_signal(number)
                assert restarting.wait(START_S) == 1
            wait_until(lambda: {*supervisor.states().values()} == {RUNNING}, START_S, "all run")
            wait_until(is_at_work, START_S, "the node is at work again")

        job = jobs.work.delay(600)
        wait_until(lambda: starts_of(jobs, [job])[job.id], START_S, "it runs")
        end(lambda: cluster.epochs.lists().draining, signal.SIGHUP, 600)
        assert starts_of(jobs, [job]) == {job.id: 1}, "it was waited for"
        end(lambda: supervisor.states()["node1"] != RUNNING, signal.SIGTERM, 0)
        jobs.app.close()


class AwayForAMoment:
    """A cluster whose Redis goes away while a node drains, and comes back after a few questions."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._failures = cluster, 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    def drain(self, node_id: str, timeout_s: float) -> NoReturn:
        self._cluster.drain(node_id)
        raise BrokerUnavailable("draining")

    def resume(self, node_id: str) -> None:
        if self._failures:
            self._failures -= 1
            raise BrokerUnavailable("resuming")
        self._cluster.resume(node_id)


@pytest.mark.timeout(240)
def test_a_node_that_was_to_be_restarted_takes_jobs_again_though_redis_was_away(jobs: Jobs, tmp_path: Path) -> None:
    with up(tmp_path, "--app", "tests.process.jobs", nodes=1):
        away: Any = AwayForAMoment(jobs.cluster)
        with pytest.raises(BrokerUnavailable, match="draining"):
            RollingRestart(away, tmp_path, drain_timeout_s=1, start_timeout_s=START_S).run(lambda _: None)
        assert not jobs.cluster.epochs.lists().draining


def test_a_rolling_restart_says_where_no_cluster_runs(jobs: Jobs, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"no cluster-tasks up answers in {re.escape(str(tmp_path))}"):
        RollingRestart(jobs.cluster, tmp_path, 1, 1).run(lambda _: None)


def broker_url_of(directory: Path) -> str:
    """The address of the Redis that ``up`` has told of."""
    found = re.search(r"CLUSTER_BROKER_URL=(\S+)", (directory / "up.log").read_text())
    assert found
    return found[1]
