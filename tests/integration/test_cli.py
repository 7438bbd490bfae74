"""``celery -A APP cluster …`` as a user and a script meet it: real command lines, a real Redis, real workers."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from celery.platforms import EX_UNAVAILABLE
from click.testing import CliRunner, Result

from cluster_tasks import Node, NodeRole
from cluster_tasks.broker.placement import Crash
from cluster_tasks.cli.cluster import cluster as group
from cluster_tasks.model import Capacity
from cluster_tasks.registry import RedisRegistry
from tests.broker import make_message
from tests.process.jobs import Jobs, make_jobs
from tests.process.nodes import WorkerProcess, running
from tests.servers import redis_for_results
from tests.waiting import wait_until
from workers.redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]
END_S = 120.0
MASTER = frozenset({NodeRole.MASTER})


def command_line(*words: str, app: str = "tests.process.jobs") -> list[str]:
    return [sys.executable, "-m", "celery", *(["-A", app] if app else []), "cluster", *words]


def run(*words: str, app: str = "tests.process.jobs", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, its output in pipes."""
    return subprocess.run(
        command_line(*words, app=app), env={**os.environ, **environ}, cwd=ROOT, capture_output=True, text=True,
        timeout=END_S, check=False,
    )  # fmt: skip


def run_on_a_terminal(columns: int, *words: str) -> str:
    """Run a command whose output goes to a terminal; return what the terminal got."""
    ours, its = pty.openpty()
    environ = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    environ.pop("NO_COLOR", None)
    with subprocess.Popen(command_line(*words), env=environ, cwd=ROOT, stdout=its, stderr=its) as process:
        os.close(its)
        told = b"".join(iter(lambda: _read(ours), b""))
        os.close(ours)
    assert process.returncode == 0, told
    return told.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says EIO when nobody has the other end any more.
        return b""


def ask(app: Celery, *words: str) -> Result:
    """Run a command in this process, for tests that ask often."""
    return CliRunner().invoke(group, words, obj=CLIContext(app, no_color=False, workdir=None))


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command that ends by a signal only; whatever it does, it has ended afterwards."""
    with subprocess.Popen(
        command_line(*words), env=os.environ, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def told(done: subprocess.CompletedProcess[str] | Result) -> Any:
    """Return the one JSON document on stdout."""
    return json.loads(done.stdout)


def lines_of(done: subprocess.CompletedProcess[str] | Result) -> list[list[str]]:
    """Return lines and cells of what went into the pipe."""
    assert "\x1b" not in done.stdout
    assert "─" not in done.stdout
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test; the commands of the test find its Redis, too."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_jobs()
    yield made
    made.app.close()


@pytest.fixture
def new_worker(redis_server: RedisServer, tmp_path: Path) -> Callable[..., WorkerProcess]:
    """Make workers of the app under test, not started yet."""
    return lambda name, **options: WorkerProcess(name, redis_server.url, tmp_path, pool="threads", **options)


def join(jobs: Jobs, node: Node) -> Node:
    """Let a node join that shows no further sign of life."""
    epoch = jobs.cluster.epochs.open(node.id, node.serves)
    joined = node.model_copy(update={"epoch": epoch, "last_seen": jobs.cluster.clock.time()})
    jobs.cluster.registry.register(joined)
    return joined


def node_of(name: str, **fields: Any) -> Node:
    return Node(id=f"{name}@host", name=name, serves=frozenset({"llm"}), capacity=Capacity(max_connections=2), **fields)


# nodes


def test_a_worker_is_listed_with_its_load(jobs: Jobs, new_worker: Callable[..., WorkerProcess]) -> None:
    with running(new_worker("a", environ={"CLUSTER_SERVES": "llm"})):
        header, cells = lines_of(run("nodes"))
        listed = dict(zip(header, cells, strict=True))
        assert (listed["id"], listed["status"], listed["roles"]) == ("a@test", "online", "worker")
        assert (listed["serves"], listed["held"], listed["queue"]) == ("llm", "0/2", "0")
        (node,) = told(run("nodes", "--json"))
        assert Node.model_validate(node) == jobs.cluster.nodes()[0].model_copy(
            update={"load": Node.model_validate(node).load, "last_seen": node["last_seen"]}
        )


def test_nodes_are_chosen_by_status_role_type_and_metadata(jobs: Jobs) -> None:
    join(jobs, node_of("a", metadata={"zone": "x", "rack": "1"}))
    join(jobs, node_of("b", metadata={"zone": "x"}))
    join(jobs, Node(id="master@host", roles=MASTER))
    jobs.cluster.drain("b@host")

    def chosen(*options: str) -> list[str]:
        return [node["id"] for node in told(ask(jobs.app, "nodes", "--json", *options))]

    assert chosen() == ["a@host", "b@host", "master@host"]
    assert chosen("--status", "draining") == ["b@host"]
    assert chosen("--role", "MASTER") == ["master@host"]
    assert chosen("--type", "llm") == ["a@host", "b@host"]
    assert chosen("--metadata", "zone=x", "--metadata", "rack=1") == ["a@host"]
    assert chosen("--type", "embedding") == []


def test_the_nodes_of_joined_clusters_are_listed_with_its_name_where_that_is_asked_for(
    jobs: Jobs, redis_server: RedisServer, tmp_path: Path
) -> None:
    join(jobs, node_of("here", metadata={"zone": "west"}))
    with redis_for_results(tmp_path / "east") as east:
        there = RedisRegistry(east.url, jobs.cluster.keys, jobs.cluster.clock)
        there.register(node_of("there", metadata={"zone": "east"}, epoch="1-a"))
        environ = {"CLUSTER_REGISTRY_JOIN": f"east={east.url}"}
        header, *cells = lines_of(run("nodes", "--joined", **environ))
        listed = [dict(zip(header, each, strict=True)) for each in cells]
        assert [(each["cluster"], each["id"], each["zone"]) for each in listed] == [
            ("-", "here@host", "west"), ("east", "there@host", "east"),
        ]  # fmt: skip
        found = told(run("nodes", "--joined", "--json", "--metadata", "zone=east", **environ))
        assert [(each["cluster"], each["id"]) for each in found] == [("east", "there@host")]
        assert [each["id"] for each in told(run("nodes", "--json", **environ))] == ["here@host"]
        there.close()
    done = run("nodes", "--joined", **environ)
    assert done.returncode == EX_UNAVAILABLE
    assert "here@host" in done.stdout
    assert "the registry of east does not answer: " in done.stderr


def test_joined_nodes_where_nothing_is_joined_is_wrong_usage(jobs: Jobs) -> None:
    done = run("nodes", "--joined")
    assert done.returncode == 2
    assert "set CLUSTER_REGISTRY_JOIN=NAME=URL" in done.stderr


def test_without_a_node_a_pipe_gets_the_header_only(jobs: Jobs) -> None:
    ((first, *_),) = lines_of(ask(jobs.app, "nodes"))
    assert first == "id"


def test_a_terminal_gets_a_table(jobs: Jobs) -> None:
    node = join(jobs, node_of("a"))
    shown = run_on_a_terminal(150, "nodes")
    assert "\x1b[32monline" in shown
    assert "───" in shown
    assert node.epoch in shown


def test_a_narrow_terminal_shows_fewer_columns_and_whole_ids(jobs: Jobs) -> None:
    node = join(jobs, Node(id="gpu-node-1@host", serves=frozenset({"llm", "embedding", "retrieval"})))
    shown = run_on_a_terminal(80, "nodes")
    assert node.id in shown
    assert "last seen s" in shown


def test_the_ready_made_app_has_the_commands_too(jobs: Jobs, tmp_path: Path) -> None:
    join(jobs, node_of("a"))
    done = subprocess.run(
        command_line("nodes", "--json", app="cluster_tasks"), env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=END_S, check=True,
    )  # fmt: skip
    assert [node["id"] for node in told(done)] == ["a@host"]


# status


def test_a_cluster_without_nodes_is_degraded(jobs: Jobs) -> None:
    done = run("status")
    assert done.returncode == 1
    assert ["health", "degraded"] in lines_of(done)
    assert ["problems", "no worker node is online"] in lines_of(done)


@contextmanager
def beating(jobs: Jobs, *nodes: Node) -> Iterator[None]:
    """Let nodes show signs of life, for commands that may take longer to start than a lease is."""
    stopping = threading.Event()

    def beat() -> None:
        while not stopping.wait(0.2):
            for node in nodes:
                jobs.cluster.epochs.beat(node.id, node.epoch)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def test_the_status_of_a_healthy_cluster_sums_it_up(jobs: Jobs) -> None:
    joined = join(jobs, node_of("a")), join(jobs, Node(id="master@host", roles=MASTER))
    jobs.cluster.events.add("node lost", node="b@host", epoch="1-x", silent_s=3.1)
    jobs.cluster.events.add("node draining", node="a@host", listed=0)
    jobs.cluster.quarantine.put(
        "poison", "jobs.work", make_message("poison", "llm"), [Crash("a@host", "1-x", "killed", 1.0)]
    )
    results = [jobs.work.delay() for _ in range(3)]
    with beating(jobs, *joined):
        done = run("status", "--json")
        assert ["health", "healthy"] in lines_of(ask(jobs.app, "status"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = told(done)
    lost = summary.pop("last_node_lost")
    assert (lost["kind"], lost["facts"]["node"]) == ("node lost", "b@host")
    assert summary == {
        "healthy": True, "problems": [], "cluster": "cluster", "broker": str(jobs.cluster.settings.broker_url),
        "nodes": {"online": 1}, "coordinators": ["master@host"], "waiting": {"node.a@host": len(results)},
        "held": 0, "in_flight": len(results), "quarantined": 1, "checks": 0, "stale_commits": 0,
    }  # fmt: skip


def test_jobs_that_no_node_serves_degrade_the_cluster(jobs: Jobs) -> None:
    join(jobs, node_of("a").model_copy(update={"serves": frozenset({"embedding"})}))
    jobs.work.delay()
    done = ask(jobs.app, "status", "--json")
    assert done.exit_code == 1
    assert told(done)["problems"] == ["jobs wait in waiting.llm, and no node that is online serves them"]


def test_a_check_lists_jobs_whose_time_has_come_though_no_node_fetches(jobs: Jobs) -> None:
    client, keys = jobs.cluster.client, jobs.cluster.keys
    join(jobs, node_of("busy"))
    sent = [jobs.work.apply_async(countdown=0.2) for _ in range(3)]
    jobs.work.apply_async(countdown=3600)
    # Whoever fetches it sets it aside.
    client.zadd(keys.delayed, {"no job": 1})

    def are_listed() -> bool:
        jobs.app.tasks["cluster.check_health"]()
        return sum(jobs.cluster.epochs.lengths().values()) == len(sent)

    wait_until(are_listed, message="the jobs are on lists")
    assert client.zcard(keys.delayed) == 2


def test_jobs_that_are_bound_to_a_coordinator_degrade_the_cluster(jobs: Jobs) -> None:
    joined, chief = join(jobs, node_of("a")), join(jobs, Node(id="chief@host", roles=MASTER))
    jobs.work.apply_async(queue="node.chief@host.bound")
    # From this one others take.
    jobs.work.apply_async(queue="node.chief@host")
    with beating(jobs, joined), beating(jobs, chief):
        done = ask(jobs.app, "status", "--json")
    assert done.exit_code == 1
    assert told(done)["problems"] == ["jobs wait in node.chief@host.bound, and that node runs none"]


def test_suspects_that_wait_for_a_node_that_serves_them_do_not_degrade_the_cluster(jobs: Jobs) -> None:
    joined = join(jobs, node_of("a"))
    jobs.cluster.client.zadd(jobs.cluster.keys.backlog, {jobs.cluster.keys.suspect_queue("llm"): 1})
    with beating(jobs, joined):
        done = ask(jobs.app, "status", "--json")
    assert done.exit_code == 0
    assert told(done)["waiting"] == {"suspect.llm": 1}


def test_a_node_that_was_killed_counts_as_silent_even_if_nobody_checks(
    jobs: Jobs, new_worker: Callable[..., WorkerProcess]
) -> None:
    with running(new_worker("a")) as (worker,):
        assert run("status").returncode == 0
        worker.kill()

        def degraded() -> Result | None:
            done = ask(jobs.app, "status", "--json")
            return done if done.exit_code == 1 else None

        done = wait_until(degraded, END_S, "its death is told")
        assert done is not None
        assert told(done)["nodes"] == {"silent": 1}


# drain and resume


def test_a_drained_node_gets_no_job_until_it_is_resumed(jobs: Jobs, new_worker: Callable[..., WorkerProcess]) -> None:
    with running(new_worker("a")) as (worker,):
        # It stands still, so that what is placed stays in its list.
        worker.signal(signal.SIGSTOP)
        results = [jobs.work.delay() for _ in range(3)]
        assert jobs.cluster.epochs.lengths() == {"node.a@test": 3}
        drained = run("drain", "a", "--json")
        assert told(drained) == {"node": "a@test", "status": "draining", "handed_over": 3}
        worker.signal(signal.SIGCONT)

        results.append(jobs.work.delay())
        assert jobs.cluster.epochs.lengths() == {"waiting.llm": 4}
        wait_until(lambda: [node["status"] for node in told(ask(jobs.app, "nodes", "--json"))] == ["draining"], END_S)
        done = run("status", "--json")
        assert (done.returncode, told(done)["nodes"]) == (1, {"draining": 1})

        resumed = run("resume", "a@test")
        assert (resumed.returncode, resumed.stdout) == (0, "a@test takes jobs again\n")
        assert {result.get(timeout=END_S) for result in results} == {"a@test"}
        wait_until(lambda: ask(jobs.app, "status").exit_code == 0, END_S)


def test_jobs_go_to_others_while_a_node_drains(jobs: Jobs, new_worker: Callable[..., WorkerProcess]) -> None:
    with running(new_worker("a"), new_worker("b")):
        done = run("drain", "a@test")
        assert (done.returncode, done.stdout) == (0, "a@test is draining; jobs handed over: 0\n")
        results = [jobs.work.delay(key=str(number)) for number in range(20)]
        assert {result.get(timeout=END_S) for result in results} == {"b@test"}


def test_a_node_that_was_drained_in_vain_is_not_said_to_run_nothing(jobs: Jobs) -> None:
    joined = join(jobs, node_of("a"))
    jobs.cluster.client.hset(jobs.cluster.keys.unacked(joined.id, joined.epoch), "1.1.1", make_message("held", "llm"))
    assert ask(jobs.app, "drain", "a", "--timeout", "0").output == (
        "a@host is draining; jobs handed over: 0; jobs handed back: 1; "
        "others run them, and what a@host goes on with is not committed\n"
    )
    again = ask(jobs.app, "drain", "a", "--timeout", "0").output
    assert again == "a@host is draining; jobs handed over: 0; it holds nothing any more\n"


@pytest.mark.parametrize("command", ["drain", "resume"])
def test_the_nearest_name_is_told_for_an_unknown_node(command: str, jobs: Jobs) -> None:
    join(jobs, node_of("gpu1"))
    done = run(command, "gpu2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: no node 'gpu2' is registered; did you mean 'gpu1'?\n"


def test_a_coordinator_is_not_drained_nor_resumed(jobs: Jobs) -> None:
    join(jobs, Node(id="master@host", roles=MASTER))
    for command in ("drain", "resume"):
        done = ask(jobs.app, command, "master@host")
        assert done.exit_code == 1
        assert "master@host is a coordinator and runs no jobs" in done.output
    assert not jobs.cluster.epochs.lists().draining


def test_a_name_that_several_nodes_have_is_refused(jobs: Jobs) -> None:
    join(jobs, Node(id="gpu1@x"))
    join(jobs, Node(id="gpu1@y"))
    done = ask(jobs.app, "drain", "gpu1")
    assert done.exit_code == 1
    assert "gpu1@x, gpu1@y" in done.stderr
    assert not jobs.cluster.client.exists(jobs.cluster.keys.draining)


# events


def test_the_last_events_are_told_the_oldest_first(jobs: Jobs) -> None:
    for number in range(3):
        jobs.cluster.events.add("node lost", node=f"n{number}@host", silent_s=3.5)
    header, *rows = lines_of(run("events", "--count", "2"))
    assert header == ["time", "kind", "facts"]
    assert [row[1:] for row in rows] == [
        ["node lost", "node=n1@host silent_s=3.5"], ["node lost", "node=n2@host silent_s=3.5"],
    ]  # fmt: skip
    assert [event["facts"]["node"] for event in told(ask(jobs.app, "events", "--json"))] == [
        "n0@host",
        "n1@host",
        "n2@host",
    ]


def test_what_nobody_could_read_is_shown_and_dropped(jobs: Jobs) -> None:
    jobs.cluster.client.rpush(jobs.cluster.keys.undecodable, "last \x1b[31m", b"\xff first")
    assert ask(jobs.app, "undecodable").stdout.splitlines() == ["last \\x1b[31m", "\\xff first"]
    assert told(ask(jobs.app, "undecodable", "--count", "1", "--json")) == ["last \x1b[31m"]
    assert told(ask(jobs.app, "undecodable", "--drop", "--json")) == {"dropped": 2}
    assert ask(jobs.app, "undecodable").stdout == ""


def test_what_an_event_holds_cannot_steer_the_terminal(jobs: Jobs) -> None:
    jobs.cluster.events.add("node lost", node="\x1b[2J[red]\tx")
    _, row = lines_of(ask(jobs.app, "events"))
    assert row[2] == r'node="\u001b[2J[red]\tx"'
    assert r"\u001b[2J[red]\tx" in run_on_a_terminal(100, "events")


def test_what_a_job_in_quarantine_is_called_cannot_steer_the_terminal(jobs: Jobs) -> None:
    crashes = [Crash("a@x", "1-a", "r\x1b[2J", 1.0)]
    jobs.cluster.quarantine.put("odd", "t\x1b]0;pwned\x07", make_message("odd", "llm"), crashes)
    shown = ask(jobs.app, "quarantine", "show", "odd").output
    assert r"t\x1b]0;pwned\x07" in shown
    assert not {"\x1b", "\x07"} & set(shown)


def test_what_is_said_of_a_job_cannot_steer_the_terminal_either(jobs: Jobs) -> None:
    again, gone, broken = (f"{name}\x9b2J" for name in ("again", "gone", "broken"))
    for job_id in (again, gone, broken):
        jobs.cluster.quarantine.put(job_id, "jobs.work", make_message(job_id, "llm"), [])
    jobs.cluster.client.hset(jobs.cluster.keys.quarantine, broken, "no JSON")
    assert ask(jobs.app, "quarantine", "retry", again).stdout.startswith(r"again\x9b2J is sent again as ")
    assert ask(jobs.app, "quarantine", "drop", gone).stdout == "gone\\x9b2J is dropped\n"
    refused = ask(jobs.app, "quarantine", "retry", broken).stderr
    assert refused.startswith(r"Error: job broken\x9b2J cannot be sent again")


def test_a_record_that_cannot_be_read_keeps_no_other_from_being_sent_again(jobs: Jobs) -> None:
    for job_id in ("first", "broken", "last"):
        jobs.cluster.quarantine.put(job_id, "jobs.work", make_message(job_id, "llm"), [])
    jobs.cluster.client.hset(jobs.cluster.keys.quarantine, "broken", "no JSON")
    done = ask(jobs.app, "quarantine", "retry", "--all")
    assert [line.partition(" is sent again")[0] for line in done.stdout.splitlines()] == ["first", "last"]
    assert done.stderr == "Error: job broken cannot be sent again, for its record cannot be read: drop it\n"
    assert done.exit_code == 1
    assert jobs.cluster.quarantine.ids() == ["broken"]


def test_events_are_followed_until_interrupted(jobs: Jobs) -> None:
    jobs.cluster.events.add("node lost", node="a@host")
    with started("events", "--follow", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["facts"] == {"node": "a@host"}
        for name in ("b@host", "c@host"):
            jobs.cluster.events.add("node resumed", node=name)
            event = json.loads(process.stdout.readline())
            assert (event["kind"], event["facts"]) == ("node resumed", {"node": name})
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 128 + signal.SIGINT
        assert process.stdout.read() == ""


# coordinator


def test_a_coordinator_checks_the_nodes_until_it_is_told_to_stop(jobs: Jobs) -> None:
    with started("coordinator", "-n", "first@%h", "-l", "info") as process:
        wait_until(lambda: jobs.cluster.checks_done() >= 2, END_S, "it checks")
        (node,) = told(run("nodes", "--role", "master", "--json"))
        assert node["name"] == "first"
        process.terminate()
        process.communicate(timeout=END_S)
    assert process.returncode == 0
    assert jobs.cluster.nodes() == []


def test_waiting_jobs_are_moved_on_demand(jobs: Jobs) -> None:
    for name in "ab":
        join(jobs, node_of(name))
    for _ in range(5):
        jobs.work.apply_async(queue="node.a@host")
    assert told(ask(jobs.app, "rebalance", "--json")) == {"moved": 2, "taken": {"a@host": 2}, "given": {"b@host": 2}}
    assert ask(jobs.app, "rebalance").stdout == "jobs moved: 0\n"
    assert [event.kind for event in jobs.cluster.events.latest()] == ["rebalanced"]


def test_the_limit_of_a_node_that_came_back_is_shown(jobs: Jobs) -> None:
    lost = join(jobs, node_of("a"))
    jobs.cluster.health.fail_over(lost.id, jobs.cluster.epochs.beats()[lost.id], 3.0)
    jobs.cluster.registry.register(lost)
    jobs.cluster.epochs.open(lost.id, lost.serves, recovery_threshold=2)
    header, cells = lines_of(ask(jobs.app, "nodes"))
    assert dict(zip(header, cells, strict=True))["status"] == "online,recovering"
    assert not jobs.cluster.nodes()[0].accepts("llm")


# What goes wrong


@pytest.mark.parametrize(
    "words",
    [["nodes"], ["status", "--json"], ["events"], ["drain", "a"], ["resume", "a"], ["rebalance"], ["coordinator"]],
    ids=" ".join,
)
def test_a_redis_that_is_down_is_told_in_one_line(words: list[str]) -> None:
    port = free_port()
    done = run(*words, CLUSTER_BROKER_URL=f"redis://:hidden@127.0.0.1:{port}/0")
    assert (done.returncode, done.stdout) == (69, "")
    (line,) = done.stderr.splitlines()
    assert f"redis://:**@127.0.0.1:{port}/0" in line
    assert "CLUSTER_BROKER_URL" in line


def test_a_wrong_password_is_told_as_one(jobs: Jobs) -> None:
    done = run("nodes", CLUSTER_BROKER_URL=jobs.app.conf.broker_url.replace("://", "://nobody:wrong@"))
    assert done.returncode == 69
    assert "names user and password)" in done.stderr
    assert "wrong" not in done.stderr
    assert "is Redis up" not in done.stderr


def test_a_registry_that_is_down_is_told_by_its_own_url(jobs: Jobs) -> None:
    done = run("nodes", CLUSTER_REGISTRY_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert (done.returncode, done.stdout) == (69, "")
    assert "CLUSTER_REGISTRY_URL" in done.stderr


def test_a_configuration_that_cannot_work_is_told_without_a_traceback() -> None:
    done = run("nodes", CLUSTER_BROKER_URL="sentinel://127.0.0.1:26379/first")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: the database of a sentinel:// URL is a number, not 'first'\n"


def test_an_app_without_a_cluster_is_refused() -> None:
    done = run("nodes", app="")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is in no cluster" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nodes", "--status", "asleep"], "'online'"),
        (["nodes", "--role", "chief"], "'master'"),
        (["nodes", "--type", "No Type"], "No Type"),
        (["nodes", "--metadata", "zone"], "KEY=VALUE"),
        (["events", "--count", "0"], "--count"),
        (["drain"], "NODE"),
        (["drain", "a", "--timeout", "-1"], "--timeout"),
        (["restart"], "--rolling"),
        (["coordinator", "-n", "no name"], "no name"),
        (["coordinator", "-l", "loud"], "'warning'"),
        (["node"], "node"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_an_error_of_the_command_line(words: list[str], named: str) -> None:
    done = ask(make_jobs().app, *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert named in done.stderr


@pytest.mark.parametrize("name", sorted(group.commands))
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    shown = CliRunner().invoke(group, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Example: celery -A cluster_tasks cluster {name}" in shown.output
