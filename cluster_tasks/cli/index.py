"""``cluster-tasks index``: a collection is filled with the texts of a folder, and kept up to date."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
from celery.platforms import EX_FAILURE
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster_tasks.cli.completing import collections
from cluster_tasks.cli.group import app_option, find_cluster, json_option, told_in_one_line
from cluster_tasks.cli.indexing import Indexing, Plan, Report
from cluster_tasks.cli.tables import print_json, printable
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import BrokerUnavailable
from cluster_tasks.model import NodeFilter
from cluster_tasks.redis_store import foreign_errors
from cluster_tasks.shards.ingest.files import Selection
from cluster_tasks.shards.ingest.splitting import MAX_SIZE, MIN_SIZE, Split

SHOWN = 20
"""Names of each kind, at most; --json has all."""
Tell = Callable[[Report], None]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--collection", required=True, metavar="NAME", shell_complete=collections, help="Made if there is none.")
@click.option("--name", default="", help="What the folder is called in the collection; else its own name.")
@click.option("--size", type=click.IntRange(MIN_SIZE, MAX_SIZE), default=1000, show_default=True,
              help="The most that a passage holds.")  # fmt: skip
@click.option("--overlap", type=click.IntRange(min=0), help="What the next may repeat of it; else a tenth of the size.")
@click.option("--unit", type=click.Choice(("characters", "tokens")), default="characters", show_default=True,
              help="What both are counted in.")  # fmt: skip
@click.option("--include", multiple=True, metavar="PATTERN", help="Look at these only, such as '*.md'; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these out, such as drafts; repeatable.")
@click.option("--batch", type=click.IntRange(1, 1000), default=16, show_default=True, help="The most files of a job.")
@app_option
@json_option
def index(
    folder: Path, collection: str, name: str, size: int, overlap: int | None, unit: str, include: Sequence[str],
    exclude: Sequence[str], batch: int, app: str, as_json: bool,
) -> None:  # fmt: skip
    """Bring a collection in line with the .md, .txt, .html, .pdf and .py files in DIR.

    New and changed files are split into passages and embedded by the nodes; passages of files that are gone are
    removed, and what has not changed is left alone. Files that --include does not look at stay as they are in the
    collection, those that --exclude leaves out are removed. A run that was interrupted is completed by the next.

    \b
    Exit codes: 0 done, 1 a file failed, 2 wrong usage, 69 Redis does not
    answer, 130 interrupted.

    \b
    Example: cluster-tasks index docs --collection manual --exclude drafts
    """
    folder = folder.resolve()
    if not (name := name or folder.name):
        raise click.UsageError("the root of a file system has no name: give it one with --name")
    if "/" in name:
        raise click.UsageError(f"--name {name}: with a slash it could be a file of another folder; leave it out")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"the folder's name {name!r} is no text: give it one with --name") from None
    try:
        split = Split(size=size, overlap=overlap, unit=unit)  # type: ignore[arg-type]  # The choice is checked.
    except ValidationError as exc:
        raise click.UsageError(exc.errors()[0]["msg"].removeprefix("Value error, ")) from None
    plan = Plan(folder, collection, name, Selection(include, exclude), split, batch)
    # A damaged file is told of in the report.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    with told_in_one_line(lambda: find_cluster(app)):
        run(_cluster(app), plan, as_json)


def run(cluster: Cluster, plan: Plan, as_json: bool) -> None:
    """Index and tell what came of it; ends the process with the code of it. Raises ClusterError."""
    from cluster_tasks.tasks import retrieval  # noqa: F401 - every app knows its jobs once the module is there

    code = 0
    with foreign_errors(BrokerUnavailable, f"connecting to {cluster.settings.broker_url}"):
        cluster.client.ping()
    with _progress(as_json) as tell, _broker():
        if not cluster.nodes(NodeFilter(request_type="retrieval")):
            click.echo("No node serves retrieval: this waits until one does.", err=True)
        indexing = Indexing(cluster.app.tasks, plan, tell)
        try:
            indexing.run()
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
            indexing.report.stopped = "interrupted"
    report = indexing.report
    if as_json:
        print_json({"collection": plan.collection, **asdict(report)})
    else:
        _print(report, plan)
    raise SystemExit(code or (EX_FAILURE if report.failed or report.stopped else 0))


def _cluster(app: str) -> Cluster:
    cluster = find_cluster(app)
    cluster.check()
    return cluster


@contextmanager
def _broker() -> Iterator[None]:
    try:
        with foreign_errors(BrokerUnavailable, "sending jobs"):
            yield
    except (BrokerUnavailable, OperationalError) as exc:
        raise BrokerUnavailable(f"broken off, the next run does the rest: {exc}") from exc


@contextmanager
def _progress(as_json: bool) -> Iterator[Tell]:
    """Show how far it is: a bar on a terminal, else a line now and then; with JSON nothing."""
    if as_json:
        yield lambda report: None
    elif sys.stderr.isatty():
        columns = TextColumn("Indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            shown = bar.add_task("", total=None)
            yield lambda report: bar.update(shown, total=report.files, completed=report.done)
    else:
        yield _Lines().tell


class _Lines:
    """One line for every twentieth of the files."""

    def __init__(self) -> None:
        self._told = 0

    def tell(self, report: Report) -> None:
        part = 20 * report.done // report.files if report.files else 0
        if part > self._told:
            self._told = part
            click.echo(f"{report.done} of {report.files} files", err=True)


def _print(report: Report, plan: Plan) -> None:
    if report.stopped:
        done = f"{report.done} of {report.files} files are done; the next run does the rest"
        click.echo(printable(f"Stopped: {report.stopped}. {done}."), err=True)
    click.echo(
        f"{plan.collection}: {len(report.indexed)} files indexed in {report.passages} passages, "
        f"{report.unchanged} unchanged, {len(report.removed)} removed, {len(report.skipped)} skipped, "
        f"{len(report.failed)} failed"
    )
    for what, why in (("skipped", report.skipped), ("failed", report.failed)):
        for path, reason in list(why.items())[:SHOWN]:
            click.echo(printable(f"{what} {path}: {' '.join(reason.split())}"), err=True)
        if len(why) > SHOWN:
            click.echo(f"… and {len(why) - SHOWN} more {what}; --json names all", err=True)


if __name__ == "__main__":
    index(prog_name="cluster-tasks index")
