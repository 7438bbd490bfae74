"""``celery -A APP cluster quarantine …``: jobs that are not run any more, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click

from cluster_tasks.cli.completing import quarantined_ids
from cluster_tasks.cli.group import ClusterGroup, json_option, pass_cluster
from cluster_tasks.cli.tables import Column, moment, print_json, print_rows, printable
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError, JobNotFound, UnavailableError
from cluster_tasks.failover.quarantine import RETRY_OF, Quarantined

LIST_COLUMNS = (
    Column("id", whole=True), Column("task"), Column("since", min_width=25), Column("crashes", number=True),
    Column("reason", wide=True),
)  # fmt: skip
CRASH_COLUMNS = (Column("time", min_width=25), Column("node", whole=True), Column("epoch"), Column("reason"))


@click.group(cls=ClusterGroup)
def quarantine() -> None:
    """Look at the jobs that are not run any more, and send them again or drop them.

    A job comes here when cluster_max_crash_deliveries processes or nodes have died while it ran. For its caller it has
    failed with QuarantinedError. It stays for cluster_quarantine_ttl_s; beyond cluster_quarantine_max the oldest go.

    \b
    Example: celery -A cluster_tasks cluster quarantine list
    """


@quarantine.command("list")
@json_option
@pass_cluster
def list_jobs(cluster: Cluster, as_json: bool) -> None:
    """List the jobs in quarantine, the first that came first.

    \b
    Example: celery -A cluster_tasks cluster quarantine list --json
    """
    kept = cluster.quarantine.each()
    if as_json:
        print_json([_facts(job) for job in kept])
        return
    rows = [(job.id, job.task, moment(job.quarantined_at), str(len(job.crashes)), job.reason) for job in kept]
    print_rows(LIST_COLUMNS, rows)


@quarantine.command()
@click.argument("job_id", metavar="ID", shell_complete=quarantined_ids)
@json_option
@pass_cluster
def show(cluster: Cluster, job_id: str, as_json: bool) -> None:
    """Show what died while job ID ran; with --json its message too, which holds the arguments.

    \b
    Example: celery -A cluster_tasks cluster quarantine show 5f9d1c3e-…
    """
    job = cluster.quarantine.get(job_id)
    if as_json:
        print_json({**_facts(job), "message": job.message})
        return
    click.echo(printable(f"{job.id} {job.task}: {job.reason}"))
    if job.retry_of:
        click.echo(printable(f"It was in quarantine before as {job.retry_of}."))
    print_rows(CRASH_COLUMNS, [(moment(crash.at), crash.node, crash.epoch, crash.reason) for crash in job.crashes])
    if job.traceback:
        click.echo("\n" + "\n".join(map(printable, job.traceback.splitlines())))


def _for_each(cluster: Cluster, job_ids: tuple[str, ...], every: bool, task: str, do: Callable[[str], None]) -> None:
    if sum((bool(job_ids), every, bool(task))) != 1:
        raise click.UsageError("give ids, or --task NAME, or --all")
    for job_id in job_ids:
        do(job_id)
    chosen = [] if job_ids else [job.id for job in cluster.quarantine.each(task)]
    failed = False
    for job_id in chosen:
        try:
            with suppress(JobNotFound):  # Somebody else was faster.
                do(job_id)
        except UnavailableError:
            raise
        except ClusterError as exc:
            failed = True
            click.echo(f"Error: {printable(str(exc))}", err=True)
    if not job_ids and not chosen:
        click.echo(
            "there is no such job in quarantine: `celery -A APP cluster quarantine list` lists those that are", err=True
        )
    if failed:
        raise SystemExit(1)


def _choosing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the jobs that it is for: ids, --all, or --task."""
    command = click.option("--task", default="", metavar="NAME", help="All jobs of one task.")(command)
    command = click.option("--all", "every", is_flag=True, help="All jobs in quarantine.")(command)
    return click.argument("job_ids", metavar="[ID]...", nargs=-1, shell_complete=quarantined_ids)(command)


@quarantine.command()
@_choosing
@json_option
@pass_cluster
def retry(cluster: Cluster, job_ids: tuple[str, ...], every: bool, task: str, as_json: bool) -> None:
    """Send jobs again, each as a new one whose id is printed.

    The new job tells in its header retry_of which one it was. With --json an object a line. With --all or --task one
    that cannot be sent again keeps no other from it, and the exit code is 1.

    \b
    Example: celery -A cluster_tasks cluster quarantine retry 5f9d1c3e-…
    """

    def send_again(job_id: str) -> None:
        new_id = cluster.quarantine.retry(job_id)
        if as_json:
            print_json({"id": new_id, RETRY_OF: job_id}, one_line=True)
        else:
            click.echo(printable(f"{job_id} is sent again as {new_id}"))

    _for_each(cluster, job_ids, every, task, send_again)


@quarantine.command()
@_choosing
@json_option
@pass_cluster
def drop(cluster: Cluster, job_ids: tuple[str, ...], every: bool, task: str, as_json: bool) -> None:
    """Forget jobs; with --json an object a line.

    \b
    Example: celery -A cluster_tasks cluster quarantine drop 5f9d1c3e-…
    """

    def forget(job_id: str) -> None:
        cluster.quarantine.drop(job_id)
        if as_json:
            print_json({"id": job_id, "dropped": True}, one_line=True)
        else:
            click.echo(printable(f"{job_id} is dropped"))

    _for_each(cluster, job_ids, every, task, forget)


def _facts(job: Quarantined) -> dict[str, Any]:
    facts = asdict(job)
    del facts["message"]
    return {**facts, "reason": job.reason, RETRY_OF: job.retry_of}
