"""``cluster-tasks``: commands for one machine. Each is a module, most of ``workers``, that this process becomes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from cluster_tasks.errors import ConfigurationError
from cluster_tasks.runtime import check_runtime


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run a cluster on this machine, fill its collections, and probe its nodes."""


def _command(name: str, module: str, about: str) -> None:
    # The module has the options, and tells them when it is asked for --help.
    @main.command(name, help=about, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def become(arguments: tuple[str, ...]) -> None:
        try:
            check_runtime([str(Path.cwd())])
        except ConfigurationError as exc:
            raise click.ClickException(str(exc)) from exc
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


_command("up", "workers.up", "Start Redis, nodes, a coordinator and Flower, and keep them running.")
_command("index", "cluster_tasks.cli.index", "Fill a collection with the texts of a folder, and keep it up to date.")
_command("ping", "cluster_tasks.cli.ping", "Tell by the exit code whether a node works; for probes.")
_command("doctor", "cluster_tasks.cli.doctor", "Look for what is wrong or may go wrong, and say what to do about it.")
_command("demo", "workers.demo", "Run the main job on real text, with a node killed midway.")


if __name__ == "__main__":
    main()
