"""``cluster-tasks``: commands for one machine. Each is a module, most of ``workers``, that this process becomes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from pkgutil import resolve_name

import click
from click.shell_completion import get_completion_class

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.runtime import check_runtime

COMMANDS = {
    "up": "workers.up:up",
    "index": "cluster_tasks.cli.index:index",
    "ping": "cluster_tasks.cli.ping:ping",
    "doctor": "cluster_tasks.cli.doctor.__main__:doctor",
    "demo": "workers.demo.__main__:demo",
}
"""The module that each becomes, and the command in it."""
SHELLS = ("bash", "zsh", "fish")
PROGRAMS = {"cluster-tasks": "_CLUSTER_TASKS_COMPLETE", "celery": "_CELERY_COMPLETE"}
"""Programs with these commands, and the variable by which a shell asks them for words."""


class Programs(click.Group):
    """Loads a command of another module where its options are wanted, and nothing is run: for completion."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command itself while words are completed, else what becomes its module."""
        if ctx.resilient_parsing and cmd_name in COMMANDS:
            found: click.Command = resolve_name(COMMANDS[cmd_name])
            return found
        return super().get_command(ctx, cmd_name)


@click.group(cls=Programs, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run a cluster on this machine, fill its collections, and look after it.

    All else is behind `celery -A APP cluster`.

    \b
    Example: cluster-tasks up --nodes 3
    """


def _command(name: str, about: str) -> None:
    module = COMMANDS[name].partition(":")[0].removesuffix(".__main__")

    # The module has the options, and tells them when it is asked for --help.
    @main.command(name, help=about, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def become(arguments: tuple[str, ...]) -> None:
        try:
            check_runtime([str(Path.cwd())])
        except ConfigurationError as exc:
            raise click.ClickException(str(exc)) from exc
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


_command("up", "Start Redis, nodes, a coordinator and Flower, and keep them running.")
_command("index", "Fill a collection with the texts of a folder, and keep it up to date.")
_command("ping", "Tell by the exit code whether a node works; for probes.")
_command("doctor", "Look for what is wrong or may go wrong, and say what to do about it.")
_command("demo", "Run the main job on real text, with a node killed midway.")


@main.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete the commands, options and names of cluster-tasks and celery.

    For bash and zsh a line of ~/.bashrc or ~/.zshrc reads it: eval "$(cluster-tasks completion bash)"

    \b
    Example: cluster-tasks completion fish > ~/.config/fish/conf.d/cluster-tasks.fish
    """
    for program, variable in PROGRAMS.items():
        made = get_completion_class(shell)
        assert made is not None
        click.echo(made(main, {}, program, variable).source())


if __name__ == "__main__":
    main()
