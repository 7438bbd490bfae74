"""Every shell and Python block of README.md and docs/, run as it stands, but for those whose fence says why not.

Each session has a network of its own, in which the ports that the guides name are free, and a folder of its own.
Whatever a block has started ends with the session. How fences are read: tests/guides.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.chaos.partitions import can_make_namespaces
from tests.guides import ROOT, Block, Session, sessions
from tests.servers import missing

LIMIT_S = 600
PATIENCE_S = 240
"""For a command to do its work: what was started before may need a while."""
URL = "redis://127.0.0.1:6379/0"
REDIS = f"""
    redis-server --bind 127.0.0.1 --save '' > .redis.log &
    export CLUSTER_BROKER_URL={URL}
"""
MODEL = f"""
    python {ROOT / "tests" / "chat_model.py"} > .model &
    until read -r address < .model; do sleep 0.2; done 2> /dev/null
    export CLUSTER_LLM_BASE_URL=$address CLUSTER_LLM_MODEL=model
"""
NODE = f"""
    export CLUSTER_CACHE_URL={URL}
    celery -A cluster_tasks worker -n given@%h -P threads -c 4 -l INFO > .given.log 2>&1 &
    until grep --quiet --no-messages ' ready\\.' .given.log; do sleep 0.2; done
"""
GIVEN = {"nothing": "", "redis": REDIS, "cluster": REDIS + NODE, "model": REDIS + MODEL + NODE}
"""What runs where a session begins."""
HEAD = """
set -u
ip link set lo up
stay=()
told() { echo "+ $1" >> .said; }
fail() { echo "$1"; tail -c 3000 "$2"; exit 1; }
patiently() {  # the command, what it prints
    local until=$((SECONDS + PATIENCE))
    until eval "$1" > "$2" 2>&1; do
        local code=$?
        ((code != 2 && code != 126 && code != 127 && SECONDS < until)) || fail "it ended with $code: $1" "$2"
        sleep 0.5
    done
}
stayed() {
    for ((place = 0; place < ${#stay[@]}; place += 2)); do
        kill -0 "${stay[place]}" 2> /dev/null || fail "what was to stay has ended" "${stay[place + 1]}"
    done
}
joined() {  # how many workers and coordinators were started: a reader sees them come before he sends jobs
    local until=$((SECONDS + 60))
    until celery -A cluster_tasks cluster nodes --json 2> /dev/null \\
        | python -c 'import json, sys; sys.exit(len(json.load(sys.stdin)) < int(sys.argv[1]))' "$1" 2> /dev/null
    do
        ((SECONDS < until)) || break
        sleep 0.3
    done
}
shown() {  # a program that looks for what is told, what prints it
    local until=$((SECONDS + PATIENCE))
    until python "$1" "$2"; do
        ((SECONDS < until)) || fail "it does not print what the guide shows" "$2"
        sleep 0.5
    done
}
"""
FINDS = r"""
import pathlib, re, sys
wanted = {wanted!r}
printed = pathlib.Path(sys.argv[1]).read_text(errors="replace")
printed = [" ".join(re.sub(r"[─━]+", " ", line).split()) for line in printed.splitlines()]
place = 0
for line in wanted:
    pattern = "".join(r"[\d.,:]+" if part[0].isdigit() else ".*" if part == "…" else re.escape(part)
                      for part in re.findall(r"\d[\d.,:]*|…|[^\d…]+", line))
    found = [number for number in range(place, len(printed)) if re.fullmatch(pattern, printed[number])]
    if not found:
        sys.exit(f"not printed: {{line}}")
    place = found[0] + 1
"""


def test_what_is_shown_is_looked_for_line_by_line(tmp_path: Path) -> None:
    program, printed = tmp_path / "shown.py", tmp_path / "printed"
    program.write_text(looking_for("3 nodes  online\n…\nend in 1.5 s\n"))

    def finds(text: str) -> bool:
        printed.write_text(text)
        return subprocess.run([sys.executable, program, printed], capture_output=True, check=False).returncode == 0

    assert finds("before\n  17 nodes online\nbetween\nend in 20 s\nafter")
    assert not finds("17 nodes online\nbetween\nend in x s")
    assert not finds("17 nodes offline\nbetween\nend in 1.5 s")
    assert not finds("end in 1.5 s\nbetween\n17 nodes online")


def looking_for(text: str) -> str:
    """Return a program that ends with 0 if a file has the lines of ``text``, in their order, among others."""
    return FINDS.format(wanted=[" ".join(line.split()) for line in text.splitlines() if line.strip()])


def script_of(session: Session, directory: Path, patience_s: int = PATIENCE_S) -> str:
    """Return what a reader does in this session, as a program of bash. Writes the files that he writes."""
    lines = [
        HEAD,
        f"PATIENCE={patience_s}",
        GIVEN[session.begin],
        f"workers={int(session.begin in ('cluster', 'model'))}",
    ]
    printed = ""
    for number, block in enumerate(session.blocks):
        lines.append(f"told {shlex.quote(str(block))}")
        if "title" in block.options:
            path = directory / block.options["title"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.is_run:
            printed = f".printed-{number}"
            lines += commands_of(block, number, printed, directory)
        elif block.language == "text" and printed:
            (directory / f".shown-{number}.py").write_text(looking_for(block.text))
            lines.append(f"shown .shown-{number}.py {printed}")
        if not block.is_run:
            printed = ""
    return "\n".join([*lines, "stayed"])


def commands_of(block: Block, number: int, printed: str, directory: Path) -> list[str]:
    """Return the lines that run a block and put what it prints into the file ``printed``."""
    if block.language == "python":
        program = directory / f"block_{number}.py"
        program.write_text(block.text)
        return [f"python {program.name} > {printed} 2>&1 || fail 'it raised' {printed}"]
    lines = [f": > {printed}"]
    for part, command in enumerate(block.commands()):
        if re.match(r"(?:export|cd|source|\.) ", command):
            lines.append(command)
        elif block.options.get("stays") or command.endswith("&"):
            # On a line of its own, for a comment may end the command.
            lines.append(f"{{ {command.removesuffix('&')}\n}} >> {printed} 2>&1 &")
            if block.options.get("stays"):
                lines.append(f"stay+=($! {printed})")
            if {"worker", "coordinator"} & set(command.split()):
                lines.append("joined $((++workers))")
        else:
            lines += [f"patiently {shlex.quote(command)} {printed}.{part}", f"cat {printed}.{part} >> {printed}"]
    return lines


def give_files(directory: Path) -> None:
    """Write what the guides take for the reader's own."""
    shutil.copytree(ROOT / "docs", directory / "docs", ignore=shutil.ignore_patterns("images"))
    (directory / "src").mkdir()
    (directory / "src/backups.py").write_text('def run() -> None:\n    """Copy everything to another machine."""\n')
    (directory / "texts.txt").write_text("first text\nsecond text\n")


def run(session: Session, directory: Path, patience_s: int = PATIENCE_S) -> str:
    """Do what a reader does, in a network of its own; return how that failed, or nothing."""
    for program in ("redis-server", "unshare", "ip"):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: the guide's commands need it")
    if not can_make_namespaces():
        pytest.skip("without the right to make a network, the ports of the guide may be others'")
    give_files(directory)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(directory)}
    environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "NO_PROXY": "127.0.0.1"}
    # Whatever it started ends with it.
    within = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*within, "timeout", str(LIMIT_S), "bash", "-c", script_of(session, directory, patience_s)]
    log = directory / ".log"
    with log.open("wb") as output:
        done = subprocess.run(command, env=environ, cwd=directory, stdout=output, stderr=output, check=False)
    if done.returncode == 0:
        return ""
    said = directory / ".said"
    reached = said.read_text() if said.exists() else ""
    return f"{reached}{log.read_text(errors='replace')}\nit ended with {done.returncode}"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Of a short name: it has sockets in it, whose paths may not be long."""
    with TemporaryDirectory(prefix="guide", ignore_cleanup_errors=True) as name:
        yield Path(name)


def of(*blocks: tuple[str, dict[str, str], str]) -> Session:
    """Return a session of such blocks."""
    made = tuple(Block("a.md", line, language, options, text) for line, (language, options, text) in enumerate(blocks))
    return Session("a.md", 1, "nothing", made)


STAYS = {"stays": "yes"}


@pytest.mark.parametrize(
    ("session", "failure"),
    [
        (of(("sh", {}, "echo one\n"), ("text", {}, "one\n")), ""),
        (of(("sh", {}, "echo one\n"), ("text", {}, "two\n")), "it does not print what the guide shows"),
        (of(("sh", {}, "false\n")), "it ended with 1: false"),
        (of(("sh", {}, "no-such-program\n")), "it ended with 127: no-such-program"),
        (of(("sh", {"norun": "why"}, "false\n")), ""),
        (of(("python", {}, "raise SystemExit(3)\n")), "it raised"),
        (of(("python", {"title": "own.py"}, "ONE = 1\n"), ("python", {}, "import own\nprint(own.ONE)\n"),
            ("text", {}, "1\n")), ""),
        (of(("sh", {}, "export NAME='a b'\n"), ("sh", {}, "echo $NAME | \\\n  tr a c\n"), ("text", {}, "c b\n")), ""),
        (of(("sh", STAYS, "echo up; sleep 100  # a comment\n"), ("text", {}, "up\n")), ""),
        (of(("sh", STAYS, "echo up\n"), ("sh", {}, "sleep 0.5\n")), "what was to stay has ended"),
        (of(("sh", {}, "sleep 1 && touch made &\ntest -e made\n")), ""),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_a_reader_would_notice_fails_a_session(session: Session, failure: str, directory: Path) -> None:
    told = run(session, directory, patience_s=3 if failure else PATIENCE_S)
    assert failure in told
    assert bool(told) == bool(failure), told


def test_blocks_are_found() -> None:
    found = sessions()
    assert {"README.md", "docs/quick-start.md", "docs/user-guide.md"} <= {session.page for session in found}
    assert sum(block.is_run for session in found for block in session.blocks) > 40


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("session", sessions(), ids=str)
def test_a_reader_can_do_what_the_page_says(session: Session, directory: Path) -> None:
    text = "\n".join(block.text for block in session.blocks if block.is_run)
    for program in ("consul", "etcd"):
        if re.search(rf"^{program} ", text, re.MULTILINE) and shutil.which(program) is None:
            missing(f"{program} is not installed: the guide's commands need it")
    assert run(session, directory) == ""
