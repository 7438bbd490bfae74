"""The help of every command: an example that can be typed, and words that a shell can complete."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from celery.bin.celery import celery
from click.testing import CliRunner
from kombu.utils.imports import symbol_by_name

from cluster_tasks.cli.cluster import cluster
from cluster_tasks.cli.main import COMMANDS, SHELLS, main

PROGRAM = ("celery", "-A", "cluster_tasks", "cluster")


def commands_of(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands_of((*path, name), each)


def every_command() -> dict[str, tuple[tuple[str, ...], click.Command]]:
    own = {name: symbol_by_name(COMMANDS[name]) if name in COMMANDS else main.commands[name] for name in main.commands}
    found = [*commands_of(PROGRAM, cluster), (("cluster-tasks",), main)]
    found += [(("cluster-tasks", name), command) for name, command in own.items()]
    return {" ".join(path): (path, command) for path, command in found}


EVERY = every_command()


@pytest.mark.parametrize("words", EVERY)
def test_the_help_of_each_command_has_examples_that_parse(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, command = EVERY[words]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "questions.txt").write_text("When?\n")
    shown = CliRunner().invoke(command, ["--help"], prog_name=words)
    assert shown.exit_code == 0
    examples = re.findall(r"^ *Example: (.+)$", shown.output, re.MULTILINE)
    assert examples, shown.output
    for example in examples:
        typed = shlex.split(re.split(r" [>|] ", example)[0])
        assert tuple(typed[: len(path)]) == path, f"{example!r} is of another command"
        parse(command, typed[len(path) :], path[-1])


def parse(command: click.Command, words: list[str], name: str) -> None:
    """Read the words as the command would, without running anything. Raises ClickException."""
    with command.make_context(name, list(words)) as ctx:
        if isinstance(command, click.Group) and ctx._protected_args:
            below, found, rest = command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
            assert found is not None
            found = symbol_by_name(COMMANDS[name]) if command is main and (name := str(below)) in COMMANDS else found
            parse(found, rest, str(below))


def test_all_that_a_command_takes_is_explained() -> None:
    unsaid = [
        f"{words} {option.opts[0]}"
        for words, (_, command) in EVERY.items()
        for option in command.params
        if isinstance(option, click.Option) and not (option.help or "").strip()
    ]
    assert not unsaid


@pytest.mark.parametrize(
    ("before", "begun", "offered"),
    [
        (["-A", "cluster_tasks", "cluster"], "dr", ["drain"]),
        (["-A", "cluster_tasks", "cluster"], "q", ["quarantine", "queues"]),
        (["-A", "cluster_tasks", "cluster", "nodes", "--status"], "dr", ["draining"]),
        (["-A", "cluster_tasks", "cluster", "queues"], "--w", ["--watch"]),
    ],
    ids=" ".join,
)
def test_celery_completes_the_commands_of_the_cluster(before: list[str], begun: str, offered: list[str]) -> None:
    assert complete(celery, before, begun) == offered


@pytest.mark.parametrize(
    ("before", "begun", "offered"),
    [([], "d", ["doctor", "demo"]), (["up"], "--flo", ["--flower-port"]), (["index"], "--coll", ["--collection"]),
     (["completion"], "z", ["zsh"])],
)  # fmt: skip
def test_cluster_tasks_completes_its_commands_and_their_options(
    before: list[str], begun: str, offered: list[str]
) -> None:
    assert sorted(complete(main, before, begun)) == sorted(offered)


def complete(command: click.Command, before: list[str], begun: str) -> list[str]:
    from click.shell_completion import ShellComplete

    return [item.value for item in ShellComplete(command, {}, "program", "_COMPLETE").get_completions(before, begun)]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_for_a_shell_is_of_both_programs(shell: str) -> None:
    shown = CliRunner().invoke(main, ["completion", shell])
    assert shown.exit_code == 0
    assert f"_CLUSTER_TASKS_COMPLETE={shell}_complete" in shown.output
    assert f"_CELERY_COMPLETE={shell}_complete" in shown.output


def test_a_command_that_only_starts_another_program_imports_neither_celery_nor_redis() -> None:
    script = "import sys; import cluster_tasks.cli.main; print({'celery', 'redis', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
