"""``cluster-tasks up``: a cluster on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import shlex
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from cluster_tasks.cli.group import Seconds
from cluster_tasks.errors import ClusterError
from workers.local import FLOWER_PORT, FLOWER_USER, POOLS, REDIS_PORT, LocalCluster, Plan
from workers.redis_server import HOST


def _bounds(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    least, separator, most = value.partition(",")
    if not (separator and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise click.BadParameter(f"expected MIN,MAX such as 1,4 with 1 <= MIN <= MAX, not {value!r}")
    return int(least), int(most)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--nodes", type=click.IntRange(min=1), default=3, show_default=True, help="How many nodes.")
@click.option("--autoscale", metavar="MIN,MAX", callback=_bounds,
              help="Instead of --nodes: MIN, and up to MAX while jobs wait.")  # fmt: skip
@click.option("--scale-down-after", "scale_down_after_s", type=Seconds(min=0), default=60, show_default=True,
              metavar="SECONDS", help="When fewer of these were enough for so long, one drains and ends.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(min=1), default=2, show_default=True, help="Jobs at a time on each.")
@click.option("--pool", type=click.Choice(POOLS), default=POOLS[0], show_default=True, help="How a node runs jobs.")
@click.option("--strategy", default="", help="How jobs are balanced, of all types; else as the settings say.")
@click.option("--flower-port", type=click.IntRange(1, 65535), default=FLOWER_PORT, show_default=True, help="Of Flower.")
@click.option("--no-flower", is_flag=True, help="Without Flower.")
@click.option("--data-dir", default="cluster-data", show_default=True, envvar="CLUSTER_DATA_DIR", show_envvar=True,
              help="For queues, logs and collections; kept from run to run.")  # fmt: skip
@click.option("--broker-url", default="", envvar="CLUSTER_BROKER_URL", show_envvar=True,
              help="A Redis that runs already; without it one is started.")  # fmt: skip
@click.option("--app", default="cluster_tasks", show_default=True, help="The Celery app, as for celery -A.")
def up(
    nodes: int, autoscale: tuple[int, int] | None, flower_port: int, no_flower: bool, data_dir: str, **options: Any
) -> None:
    """Start Redis, nodes, a coordinator and Flower, and keep them running.

    Ctrl-C or SIGTERM ends all of it: nodes finish the jobs that they run, what waits stays in --data-dir.

    \b
    Example: cluster-tasks up --nodes 3 --strategy adaptive
    """
    if "://" in data_dir:
        raise click.UsageError(f"--data-dir must be a folder of this machine, not {data_dir}")
    given = click.get_current_context().get_parameter_source("nodes")
    if autoscale and given is not ParameterSource.DEFAULT:
        raise click.UsageError("--autoscale says how many nodes there are: leave --nodes out")
    least, most = autoscale or (nodes, nodes)
    interrupt_on_signals()
    plan = Plan(
        Path(data_dir), least, flower_port=0 if no_flower else flower_port, redis_port=REDIS_PORT, most_nodes=most,
        **options,
    )  # fmt: skip
    try:
        run(LocalCluster(plan))
    except ClusterError as exc:
        raise click.ClickException(str(exc)) from exc


def interrupt_on_signals() -> None:
    """Let SIGTERM and a terminal that closes do what Ctrl-C does."""
    for number, interrupt in ((signal.SIGTERM, signal.default_int_handler), (signal.SIGHUP, _hang_up)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _hang_up(number: int, frame: FrameType | None) -> None:
    # Of a terminal that closes both shell and kernel tell: nobody is in such a hurry.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.default_int_handler(number, frame)


def run(local: LocalCluster) -> None:
    """Run a cluster until this process is interrupted. Raises ClusterError if it cannot start."""
    with local:
        try:
            click.echo(f"Starting {local.plan.nodes} nodes in {local.directory}")
            for name in local.wait_for_all():
                click.echo(f"{name} has not joined yet; see {local.directory}/logs/{name}.log", err=True)
            click.echo(banner(local))
            local.keep_running(lambda news: click.echo(news, err=True))
        except KeyboardInterrupt:
            with suppress(OSError):  # The terminal may be gone.
                click.echo("Ending: jobs that run may finish. Ctrl-C again ends at once.")


def banner(local: LocalCluster) -> str:
    """Return what there is to know of a cluster that runs."""
    plan, where = local.plan, [("Redis", str(local.cluster.settings.broker_url))]
    if local.flower_port:
        login = f", user {FLOWER_USER}" if local.cluster.settings.flower_password else ""
        where.append(("Flower", f"http://{HOST}:{local.flower_port}/cluster{login}"))
    if plan.most_nodes > plan.nodes:
        where.append(("Nodes", f"{plan.nodes}, and up to {plan.most_nodes} while jobs wait"))
    where.append(("Logs", f"{local.directory}/logs"))
    if local.redis and local.redis.port != plan.redis_port:
        where.append(("Note", f"Redis is not at {plan.redis_port}, which is taken"))
    if local.flower_port != plan.flower_port:
        where.append(("Note", f"Flower is not at {plan.flower_port}, which is taken"))
    lines = [*(f"  {name:<8}{value}" for name, value in where), "", "In other shells:"]
    lines += [f"  export {name}={shlex.quote(value)}" for name, value in local.variables().items()]
    lines += [
        f"  celery -A {plan.app} worker -n more1@%h    # one more node",
        f"  celery -A {plan.app} cluster nodes         # who does what",
        f"  celery -A {plan.app} cluster restart --rolling",
        "",
        "Ctrl-C ends all of it.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    up(prog_name="cluster-tasks up")
