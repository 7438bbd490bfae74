"""``cluster-tasks doctor``."""

from __future__ import annotations

import click

from cluster_tasks.cli.doctor.command import about, diagnose, tell
from cluster_tasks.cli.group import app_option, find_cluster, json_option, told_in_one_line


@click.command(help=about("cluster-tasks doctor --json"), context_settings={"help_option_names": ["-h", "--help"]})
@app_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, app: str, as_json: bool) -> None:
    """Look for what is wrong or may go wrong with the cluster of an app."""
    with told_in_one_line(lambda: find_cluster(app)):
        ctx.exit(tell(diagnose(find_cluster(app)), as_json))


if __name__ == "__main__":
    doctor(prog_name="cluster-tasks doctor")
