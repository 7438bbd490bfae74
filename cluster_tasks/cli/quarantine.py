"""``celery -A APP cluster quarantine …``: jobs that are not run any more, and what becomes of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cluster_tasks.cli.group import ClusterGroup, json_option, pass_cluster
from cluster_tasks.cli.tables import Column, moment, print_json, print_rows
from cluster_tasks.cluster import Cluster
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
    failed with QuarantinedError.

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
    kept = cluster.quarantine.jobs()
    if as_json:
        print_json([_facts(job) for job in kept])
        return
    rows = [(job.id, job.task, moment(job.quarantined_at), str(len(job.crashes)), job.reason) for job in kept]
    print_rows(LIST_COLUMNS, rows)


@quarantine.command()
@click.argument("job_id", metavar="ID")
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
    click.echo(f"{job.id} {job.task}: {job.reason}")
    print_rows(CRASH_COLUMNS, [(moment(crash.at), crash.node, crash.epoch, crash.reason) for crash in job.crashes])


@quarantine.command()
@click.argument("job_id", metavar="ID")
@json_option
@pass_cluster
def retry(cluster: Cluster, job_id: str, as_json: bool) -> None:
    """Send job ID again, as a new job whose id is printed.

    \b
    Example: celery -A cluster_tasks cluster quarantine retry 5f9d1c3e-…
    """
    new_id = cluster.quarantine.retry(job_id)
    if as_json:
        print_json({"id": new_id, RETRY_OF: job_id})
    else:
        click.echo(f"{job_id} is sent again as {new_id}")


@quarantine.command()
@click.argument("job_id", metavar="ID")
@json_option
@pass_cluster
def drop(cluster: Cluster, job_id: str, as_json: bool) -> None:
    """Forget job ID.

    \b
    Example: celery -A cluster_tasks cluster quarantine drop 5f9d1c3e-…
    """
    cluster.quarantine.drop(job_id)
    if as_json:
        print_json({"id": job_id, "dropped": True})
    else:
        click.echo(f"{job_id} is dropped")


def _facts(job: Quarantined) -> dict[str, Any]:
    facts = asdict(job)
    del facts["message"]
    return {**facts, "reason": job.reason}
