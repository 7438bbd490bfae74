"""``cluster-tasks``: commands for one machine. Each is a module of ``workers``, which this process becomes."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import click

from cluster_tasks.errors import ConfigurationError

RUNTIME = Path(__file__).parents[2] / "workers"
"""The node's runtime; this package starts it as processes and never imports it."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Run a cluster on this machine."""


def _command(name: str, module: str, about: str) -> None:
    # The module has the options, and tells them when it is asked for --help.
    @main.command(name, help=about, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def become(arguments: tuple[str, ...]) -> None:
        try:
            check_runtime()
        except ConfigurationError as exc:
            raise click.ClickException(str(exc)) from exc
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


_command("up", "workers.up", "Start Redis, nodes, a coordinator and Flower, and keep them running.")
_command("demo", "workers.demo", "Run the main job on real text, with a node killed midway.")


def check_runtime() -> None:
    """Raise ConfigurationError if processes that are started here would find a foreign package ``workers``."""
    spec = PathFinder.find_spec("workers", [str(Path.cwd()), *sys.path])
    if spec is None or spec.origin is None or Path(spec.origin).parent != RUNTIME:
        found = (spec.origin or "a folder without __init__.py") if spec else "nothing"
        raise ConfigurationError(
            f"the node's runtime is the top-level package 'workers' at {RUNTIME}, but Python finds {found}: "
            "rename the other package, or start from a folder where it does not come first"
        )


if __name__ == "__main__":
    main()
