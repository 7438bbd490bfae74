"""The command ``cluster-tasks demo``."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click
import redis
from rich.console import Console

from cluster_tasks.errors import ClusterError
from workers.demo.corpus import passages
from workers.demo.home import own_cluster
from workers.demo.report import Report, table
from workers.demo.story import Story
from workers.local import FLOWER_PORT, LocalCluster
from workers.up import banner, interrupt_on_signals


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--nodes", type=click.IntRange(min=2), default=3, show_default=True, help="How many; one is killed.")
@click.option("--jobs", type=click.IntRange(min=50), default=600, show_default=True, help="How many.")
@click.option("--strategy", default="least_connection", show_default=True, help="How jobs are balanced.")
@click.option("--corpus", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
              help="A folder of .md, .txt and .py files instead of Python's docstrings.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave it running, with Flower, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, all else on stderr.")
def demo(nodes: int, jobs: int, strategy: str, corpus: Path | None, keep: bool, as_json: bool) -> None:
    """Run the main job on real text, with a node killed midway.

    Indexes passages and sends some jobs twice, the second time to be served by the cache. Then it sends jobs of three
    types, kills a node with SIGKILL while it runs jobs and others are in its list, and counts what became of each job.
    Redis is its own, or that of CLUSTER_BROKER_URL under a name of its own, and then there is no cache.

    Exits with 1 if a promise was broken.

    \b
    Example: cluster-tasks demo --nodes 3 --jobs 600
    """
    interrupt_on_signals()
    console = Console(stderr=as_json, highlight=False)
    try:
        with own_cluster(nodes, strategy, FLOWER_PORT if keep else 0) as local:
            result = tell(local, jobs, corpus, console)
            if as_json:
                click.echo(json.dumps(result.as_dict()))
            if keep:
                console.print(banner(local))
                with suppress(KeyboardInterrupt):
                    local.keep_running(console.print)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ClusterError, redis.RedisError) as exc:
        raise click.ClickException(str(exc)) from exc
    sys.exit(1 if any(result.broken()) else 0)


def tell(local: LocalCluster, jobs: int, corpus: Path | None, console: Console) -> Report:
    """Run the demo on a cluster that begins to run, and print what happens and what came of it."""
    console.print(f"{local.plan.nodes} nodes and a coordinator start")
    # Read while they do.
    found = passages(corpus)
    if missing := local.wait_for_all():
        raise ClusterError(f"did not join: {'; '.join(f'{name} ({local.last_words(name)})' for name in missing)}")
    story = Story(local, console)
    story.index(found)
    repetition = story.repeat(found)
    result = story.work(found, jobs, repetition)
    console.print(table(result))
    broken = list(result.broken())
    console.print("\n".join(f"Broken: {promise}" for promise in broken) if broken else "Every promise was kept.")
    return result


if __name__ == "__main__":
    demo(prog_name="cluster-tasks demo")
