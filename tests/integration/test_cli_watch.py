"""Views that go on, and completion of names: as a terminal, a pipe and a shell meet them, with a real Redis."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery.bin.base import CLIContext
from celery.bin.celery import celery
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from cluster_tasks import Node
from cluster_tasks.broker.placement import Crash
from cluster_tasks.cli.cluster import cluster as group
from cluster_tasks.shards.assignments import Division
from tests.broker import make_message
from tests.process.jobs import Jobs, make_jobs
from tests.waiting import wait_until
from workers.redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]
END_S = 240.0
APP = "tests.process.jobs"
OWN_SCREEN, OLD_SCREEN, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


@pytest.fixture
def jobs(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The app under test; the commands of the test find its Redis, too."""
    monkeypatch.setenv("CLUSTER_BROKER_URL", redis_server.url)
    made = make_jobs()
    yield made
    made.app.close()


def join(jobs: Jobs, node_id: str) -> Node:
    """Let a node join that shows no further sign of life."""
    node = Node(id=node_id, serves=frozenset({"llm"}))
    epoch = jobs.cluster.epochs.open(node.id, node.serves)
    assert isinstance(epoch, str)
    joined = node.model_copy(update={"epoch": epoch, "last_seen": jobs.cluster.clock.time()})
    jobs.cluster.registry.register(joined)
    return joined


def command_line(*words: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", APP, "cluster", *words]


class Terminal:
    """A command on a terminal of so many lines, and what that was sent."""

    def __init__(self, lines: int, *words: str) -> None:
        self._ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 100, 0, 0))
        environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            command_line(*words), cwd=ROOT, env={**environ, "TERM": "xterm-256color"}, stdin=its, stdout=its, stderr=its
        )
        os.close(its)
        self.sent = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.sent += os.read(self._ours, 65536)
            except OSError:  # Linux says EIO when nobody has the other end any more.
                return

    def last(self) -> str:
        """The words of the last picture that is whole: the next has begun."""
        pictures = self.sent.split(b"\x1b[H")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", b"".join(pictures[-2:-1]).decode(errors="replace"))

    def shows(self, words: str) -> None:
        wait_until(lambda: words in self.last(), END_S, f"{words} in {self.sent[-2000:]!r}")

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(END_S)
        self._reader.join(END_S)
        os.close(self._ours)
        return code


@contextmanager
def on_a_terminal(lines: int, *words: str) -> Iterator[Terminal]:
    terminal = Terminal(lines, *words)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.end(signal.SIGKILL)


def test_a_terminal_shows_the_nodes_as_they_are_until_ctrl_c(jobs: Jobs, redis_server: RedisServer) -> None:
    join(jobs, "a@host")
    with on_a_terminal(24, "nodes", "--watch", "0.2") as terminal:
        terminal.shows("a@host")
        assert "every 0.2 s" in terminal.last()
        join(jobs, "b@host")
        terminal.shows("b@host")
        jobs.cluster.drain("b@host")
        terminal.shows("draining")
        redis_server.stop()
        terminal.shows("not up to date since")
        assert "b@host" in terminal.last(), "what was seen last stays in sight"
        redis_server.start()
        wait_until(lambda: "not up to date" not in terminal.last(), END_S, "it goes on")
        assert terminal.end() == 128 + signal.SIGINT
        assert terminal.sent.count(OWN_SCREEN) == 1
        assert terminal.sent.rindex(OLD_SCREEN) > terminal.sent.rindex(OWN_SCREEN)
        assert terminal.sent.rindex(CURSOR) > terminal.sent.rindex(OWN_SCREEN)
        assert b"Traceback" not in terminal.sent


def test_a_small_terminal_shows_what_wants_somebody_first_and_sigterm_gives_it_back(jobs: Jobs) -> None:
    for number in range(30):
        join(jobs, f"n{number:02}@host")
    jobs.cluster.drain("n29@host")
    with on_a_terminal(12, "nodes", "--watch", "0.2") as terminal:
        terminal.shows("n29@host")
        shown = terminal.last()
        assert "and 22 more" in shown
        assert "n00@host" in shown
        assert "n20@host" not in shown
        assert terminal.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert terminal.sent.rindex(OLD_SCREEN) > terminal.sent.rindex(OWN_SCREEN)


def test_a_pipe_gets_one_plain_snapshot_after_the_other(jobs: Jobs) -> None:
    join(jobs, "a@host")
    jobs.work.delay()
    with subprocess.Popen(
        command_line("queues", "--watch", "0.2"), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            block = lambda: list(iter(process.stdout.readline, "\n"))  # type: ignore[union-attr]  # noqa: E731
            header = "queue\tkind\tjobs\ttakers\theld\n"
            assert block() == [header, "node.a@host\tnode\t1\ta@host\t0/1\n"]
            jobs.work.delay()
            wait_until(lambda: block()[1].split("\t")[2] == "2", END_S, "the second job is told")
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=END_S)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "\x1b" not in rest
    assert "Traceback" not in errors


def test_with_json_each_snapshot_is_a_line_and_an_outage_is_told_beside(jobs: Jobs, redis_server: RedisServer) -> None:
    join(jobs, "a@host")
    with subprocess.Popen(
        command_line("nodes", "--json", "--watch", "0.2"), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first = json.loads(process.stdout.readline())
            assert [node["id"] for node in first["rows"]] == ["a@host"]
            assert abs(first["at"] - time.time()) < END_S
            redis_server.stop()
            assert "trying again" in process.stderr.readline()
            redis_server.start()
            wait_until(lambda: json.loads(process.stdout.readline())["rows"] == [], END_S, "it goes on")  # type: ignore[union-attr]
            process.send_signal(signal.SIGINT)
            assert process.wait(END_S) == 128 + signal.SIGINT
        finally:
            process.kill()


def ask(jobs: Jobs, *words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(group, words, obj=CLIContext(jobs.app, no_color=False, workdir=None))
    return done.exit_code, done.stdout, done.stderr


def test_queues_are_listed_once_without_watch(jobs: Jobs) -> None:
    jobs.work.delay()
    jobs.work.apply_async(countdown=3600)
    code, told, _ = ask(jobs, "queues", "--json")
    assert code == 0
    assert [(row["queue"], row["jobs"], row["takers"]) for row in json.loads(told)] == [
        ("waiting.llm", 1, []), ("cluster.delayed", 1, []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nodes", "--watch", "0"], "0.2"),
        (["queues", "--watch", "often"], "often"),
        (["queues", "--watch", "nan"], "no number of seconds"),
        (["nodes", "--watch", "inf"], "no number of seconds"),
        (["nodes", "--watch", "--follow"], "give one of them"),
    ],
    ids=" ".join,
)
def test_a_watch_that_cannot_be_is_refused(jobs: Jobs, words: list[str], told: str) -> None:
    code, out, errors = ask(jobs, *words)
    assert (code, out) == (2, "")
    assert told in errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["drain", "gpu9"], "no node 'gpu9' is registered; `celery -A APP cluster nodes` lists those that exist"),
        (["quarantine", "show", "x"], "no job 'x' is in quarantine; `celery -A APP cluster quarantine list` lists"),
    ],
    ids=" ".join,
)
def test_what_is_not_found_is_told_with_where_to_look(jobs: Jobs, words: list[str], told: str) -> None:
    code, _, errors = ask(jobs, *words)
    assert code == 1
    assert told in errors


# Completion


def complete(jobs: Jobs, *words: str) -> list[str]:
    *before, begun = ("cluster", *words)
    # The app itself: of one that is found by name, this process may have read the settings in another test.
    offered = ShellComplete(celery, {"default_map": {"app": jobs.app}}, "celery", "_CELERY_COMPLETE")
    return [item.value for item in offered.get_completions(before, begun)]


def test_names_are_completed_from_the_cluster(jobs: Jobs) -> None:
    join(jobs, "gpu1@x")
    join(jobs, "twin@x")
    join(jobs, "twin@y")
    jobs.cluster.assignments.announce("docs", Division(1, 2))
    jobs.cluster.quarantine.put("5f9d", "jobs.work", make_message("5f9d", "llm"), [Crash("a@x", "1-x", "killed", 1.0)])
    assert complete(jobs, "drain", "") == ["gpu1", "twin@x", "twin@y"]
    assert complete(jobs, "resume", "gp") == ["gpu1"]
    assert complete(jobs, "nodes", "--type", "l") == ["llm"]
    assert complete(jobs, "shards", "split", "d") == ["docs"]
    assert complete(jobs, "shards", "move", "docs/") == ["docs/0", "docs/1"]
    assert complete(jobs, "quarantine", "retry", "5") == ["5f9d"]


def test_what_a_shell_would_run_or_take_apart_is_not_offered(jobs: Jobs) -> None:
    for job_id in ("$(id)", "`id`", "a b", "a;id", "a\x1b[2J", "a\n", "a.b:c/d@e_f-1"):
        jobs.cluster.quarantine.put(job_id, "jobs.work", make_message("5f9d", "llm"), [])
    assert complete(jobs, "quarantine", "retry", "") == ["a.b:c/d@e_f-1"]


def in_bash(words: str, module: str = "celery.__main__", **environ: str) -> tuple[str, str]:
    """Press Tab behind words, as the script for bash does; return what it gets, and what the terminal gets."""
    name = words.split()[0]
    asked = {f"_{name.upper().replace('-', '_')}_COMPLETE": "bash_complete", "COMP_WORDS": words}
    asked["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    program = f"import sys; sys.argv = [{name!r}]; from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked, **environ}, cwd=ROOT, capture_output=True,
        text=True, timeout=END_S, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


def test_bash_gets_names_for_both_programs(jobs: Jobs) -> None:
    join(jobs, "gpu1@x")
    jobs.cluster.assignments.announce("docs", Division(1, 2))
    assert in_bash(f"celery -A {APP} cluster drain g") == ("plain,gpu1", "")
    own = in_bash(f"cluster-tasks index docs --app {APP} --collection d", "cluster_tasks.cli.main")
    assert own == ("plain,docs", "")


def test_completion_is_silent_without_redis_and_without_an_app() -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    assert in_bash(f"celery -A {APP} cluster drain g", CLUSTER_BROKER_URL=away) == ("", "")
    assert in_bash("celery -A no_such_app cluster drain g") == ("", "")
    assert in_bash("celery cluster drain g") == ("", "")
