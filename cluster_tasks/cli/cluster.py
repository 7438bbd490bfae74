"""``celery -A APP cluster …``: look at the cluster of an app, and steer it.

A command is a function under ``@cluster.command()`` and ``@pass_cluster``; it lets the errors of the facade pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import Any

import click
from celery import Celery
from celery.platforms import EX_FAILURE, EX_OK, EX_UNAVAILABLE
from celery.utils.nodenames import default_nodename, host_format
from kombu.utils.imports import symbol_by_name

from cluster_tasks.broker.placement import UNDECODABLE_KEPT
from cluster_tasks.cli.cache import cache
from cluster_tasks.cli.completing import node_names, request_types
from cluster_tasks.cli.doctor.command import about, diagnose, tell
from cluster_tasks.cli.events import events, tell_changes
from cluster_tasks.cli.group import ClusterGroup, Seconds, json_option, node_id_of, pass_cluster
from cluster_tasks.cli.live import View, show, watch_option
from cluster_tasks.cli.quarantine import quarantine
from cluster_tasks.cli.queues import Kind, queue_rows
from cluster_tasks.cli.registry import registry
from cluster_tasks.cli.shards import shards
from cluster_tasks.cli.summary import Summary, summarize
from cluster_tasks.cli.tables import Cell, Column, moment, print_json, print_rows, printable
from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.errors import ClusterError
from cluster_tasks.failover.problems import WORKING
from cluster_tasks.model import Node, NodeFilter, NodeRole, NodeStatus, check_node_id, check_request_type
from cluster_tasks.registry.joined import OWN, ClusterNodes
from cluster_tasks.runtime import check_runtime

NODE_COLUMNS = (
    Column("id", whole=True), Column("status", whole=True), Column("roles", wide=True), Column("zone", wide=True),
    Column("serves"), Column("held", number=True), Column("queue", number=True), Column("qps", number=True),
    Column("cpu_percent", number=True),
    Column("memory_mb", number=True, wide=True), Column("success_rate", number=True, wide=True),
    Column("epoch", wide=True), Column("last_seen_s", number=True),
)  # fmt: skip
QUEUE_COLUMNS = (
    Column("queue", whole=True), Column("kind", whole=True), Column("jobs", number=True), Column("takers"),
    Column("held", number=True),
)  # fmt: skip
TAKERS_SHOWN = 5
JOINED_COLUMNS = (Column("cluster", whole=True), *NODE_COLUMNS)
STATUS_COLUMNS = (Column("name"), Column("value"))


@click.group(cls=ClusterGroup)
def cluster() -> None:
    """Look at the cluster of an app, and steer it.

    \b
    Exit codes: 0 done, 1 refused or degraded, 2 wrong usage,
    69 Redis or the registry does not answer.

    \b
    Example: celery -A cluster_tasks cluster nodes
    """


cluster.add_command(cache)
cluster.add_command(events)
cluster.add_command(quarantine)
cluster.add_command(registry)
cluster.add_command(shards)


def _metadata(_: click.Context, __: click.Parameter, values: Sequence[str]) -> Mapping[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not (key and separator) for key, separator, _ in pairs):
        raise click.BadParameter(f"expected KEY=VALUE, not {' '.join(values)}")
    return {key: value for key, _, value in pairs}


def _request_type(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else check_request_type(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


@cluster.command()
@click.option("--status", type=click.Choice(NodeStatus, case_sensitive=False), help="Only nodes of this status.")
@click.option("--role", type=click.Choice(NodeRole, case_sensitive=False), help="Only nodes of this role.")
@click.option("--type", "request_type", metavar="TYPE", callback=_request_type,
              shell_complete=request_types, help="Only nodes that serve this type.")  # fmt: skip
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, callback=_metadata,
              help="Only nodes with this in their metadata; can be repeated.")  # fmt: skip
@click.option("--follow", is_flag=True, help="Tell who joins, changes and leaves; with --json an object a line.")
@watch_option
@click.option("--joined", is_flag=True,
              help="Also the nodes of the clusters in CLUSTER_REGISTRY_JOIN, with the name of each.")  # fmt: skip
@json_option
@pass_cluster
def nodes(
    cluster: Cluster,
    status: NodeStatus | None,
    role: NodeRole | None,
    request_type: str | None,
    metadata: Mapping[str, str],
    follow: bool,
    watch: float | None,
    joined: bool,
    as_json: bool,
) -> None:
    """List the nodes and what they carry.

    Beside the status stands why a node is given fewer jobs than it could run. Recovering: it was lost, and has to beat
    a few times. Ejected, half-open, probing: it did its jobs worse than the others, and gets none, or single probes.
    Ramping: it passed them. Held are the jobs a node runs or has reserved, of so many slots; queue, those in its list;
    last seen, the seconds since its last report. What the queues of joined clusters hold is not known. A terminal of
    fewer than 120 columns shows the most telling ones.

    \b
    Example: celery -A cluster_tasks cluster nodes --status online --type llm
    Example: celery -A cluster_tasks cluster nodes --watch 1
    Example: celery -A cluster_tasks cluster nodes --follow --json
    """
    where = NodeFilter(status, role, request_type, metadata)
    if follow and watch is not None:
        raise click.UsageError("--follow tells changes and --watch shows how it is: give one of them")
    if joined and watch is not None:
        raise click.UsageError("--watch shows this cluster: give --follow with --joined, or leave one of them out")
    if joined and not cluster.settings.registry_join:
        raise click.UsageError("--joined: no cluster is joined: set CLUSTER_REGISTRY_JOIN=NAME=URL")
    if follow:
        tell_changes(cluster, where, as_json, joined)
        return
    if joined:
        _list_all(cluster, where, as_json)
        return
    show(NODE_COLUMNS, lambda: _view_of_nodes(cluster, where), f"nodes of {cluster.settings.name}", watch, as_json)


def _view_of_nodes(cluster: Cluster, where: NodeFilter) -> View:
    found, now = cluster.nodes(where), cluster.clock.time()
    counts = Counter(node.status.value for node in found)
    in_flight = sum(node.in_flight for node in found)
    return View(
        rows=[_node_cells(node, now) for node in found],
        document=[node.model_dump(mode="json") for node in found],
        urgent=[node.status not in WORKING or bool(node.limit) for node in found],
        summary=f"{_counts(counts)}; {in_flight} jobs in flight" if found else "none",
    )


def _list_all(cluster: Cluster, where: NodeFilter, as_json: bool) -> None:
    """The nodes of this cluster and of those that are joined to its view; those that do not answer are named last."""
    everyone = [ClusterNodes(OWN, cluster.nodes(where)), *cluster.joined.read(where)]
    found = [(each.name, node) for each in everyone for node in each.nodes]
    if as_json:
        print_json([{"cluster": name, **node.model_dump(mode="json")} for name, node in found])
    else:
        now = cluster.clock.time()
        print_rows(JOINED_COLUMNS, [(name, *_node_cells(node, now)) for name, node in found])
    away = [each for each in everyone if each.away]
    for each in away:
        click.echo(f"the registry of {each.name} does not answer: {printable(each.away)}", err=True)
    if away:
        click.get_current_context().exit(EX_UNAVAILABLE)


def _node_cells(node: Node, now: float) -> tuple[Cell, ...]:
    load = node.load
    return (
        node.id,
        [node.status, node.limit] if node.limit else node.status,
        sorted(node.roles),
        node.zone,
        sorted(node.serves),
        f"{load.current_connections}/{node.capacity.max_connections}",
        str(load.queue_length),
        f"{load.current_qps:.1f}",
        f"{load.cpu_usage_percent:.0f}",
        f"{load.memory_usage_mb:.0f}",
        f"{load.success_rate:.2f}",
        node.epoch,
        f"{max(now - node.last_seen, 0):.1f}" if node.last_seen else "",
    )


@cluster.command()
@watch_option
@json_option
@pass_cluster
def queues(cluster: Cluster, watch: float | None, as_json: bool) -> None:
    """List the lists that hold jobs, the longest first.

    Beside the lists of nodes: waiting, for jobs that have no node, suspect, for those that were running when a process
    died, delayed, for those whose time has not come, control, for the tasks of coordinators. Takers are the nodes that
    take from a list first; of the list of a node, others take as well when they are idle and serve what it serves. Held
    is what takers run or have reserved, of so many slots. A list that has jobs and no takers stands first.

    \b
    Example: celery -A cluster_tasks cluster queues
    Example: celery -A cluster_tasks cluster queues --watch
    """
    show(QUEUE_COLUMNS, lambda: _view_of_queues(cluster), f"queues of {cluster.settings.name}", watch, as_json)


def _view_of_queues(cluster: Cluster) -> View:
    rows = queue_rows(cluster)
    waiting = sum(row.jobs for row in rows if row.kind not in (Kind.DELAYED, Kind.CONTROL))
    return View(
        rows=[
            (
                row.queue,
                row.kind,
                str(row.jobs),
                row.takers[:TAKERS_SHOWN] + _more(row.takers),
                f"{row.held}/{row.slots}",
            )
            for row in rows
        ],
        document=[asdict(row) for row in rows],
        urgent=[row.stuck for row in rows],
        summary=f"{waiting} jobs wait",
    )


def _more(takers: Sequence[str]) -> list[str]:
    return [f"+{len(takers) - TAKERS_SHOWN}"] if len(takers) > TAKERS_SHOWN else []


@cluster.command()
@json_option
@pass_cluster
def status(cluster: Cluster, as_json: bool) -> None:
    """Sum up the cluster; exit with 1 if it is degraded.

    It is degraded while no worker node is online or busy, and while jobs wait that no such node serves. Nodes that
    do not beat for a lease count as silent, whatever they reported last.

    \b
    Example: celery -A cluster_tasks cluster status --json
    """
    summary = summarize(cluster)
    if as_json:
        print_json({"healthy": not summary.problems, **asdict(summary)})
    else:
        print_rows(STATUS_COLUMNS, list(_status_cells(summary)), header=False)
    click.get_current_context().exit(EX_FAILURE if summary.problems else EX_OK)


@cluster.command(help=about("celery -A cluster_tasks cluster doctor"))
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look for what is wrong or may go wrong with the cluster of an app."""
    ctx.exit(tell(diagnose(cluster_of(ctx.obj.app)), as_json))


def _status_cells(summary: Summary) -> Iterator[tuple[str, str]]:
    lost = summary.last_node_lost
    yield "cluster", summary.cluster
    yield "broker", summary.broker
    yield "health", "degraded" if summary.problems else "healthy"
    yield "problems", "; ".join(summary.problems)
    yield "nodes", _counts(summary.nodes)
    yield "coordinators", " ".join(summary.coordinators)
    yield "waiting", _counts(summary.waiting)
    yield "held", str(summary.held)
    yield "in flight", str(summary.in_flight)
    yield "quarantined", str(summary.quarantined)
    yield "last node lost", f"{lost.facts.get('node')} at {moment(lost.timestamp)}" if lost else ""
    yield "health checks", str(summary.checks)
    yield "stale commits", str(summary.stale_commits)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


@cluster.command()
@click.argument("node", shell_complete=node_names)
@click.option("--wait", is_flag=True, help="Wait until it holds nothing any more.")
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS",
              help="Wait so long; then others run what it still runs.")  # fmt: skip
@json_option
@pass_cluster
def drain(cluster: Cluster, node: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Place nothing new on NODE, and hand its list to the others.

    What it runs goes on, with --timeout for so long: then it is handed back to the cluster, without a crash being
    counted, and NODE cannot commit it any more. NODE is an id, or what stands before the @ if only one node has that
    name; %h in it is this host.

    \b
    Example: celery -A cluster_tasks cluster drain gpu1 --timeout 60
    """
    node_id = node_id_of(cluster, node)
    cluster.refuse_coordinator(node_id)
    moved = cluster.drain(node_id, timeout_s=inf if wait and timeout is None else timeout)
    waited = wait or timeout is not None
    if as_json:
        told = {"node": node_id, "status": NodeStatus.DRAINING, "handed_over": moved.listed}
        print_json(told | ({"handed_back": moved.held} if waited else {}))
    else:
        ended = "; it holds nothing any more" if waited else ""
        if moved.held:
            # Threads go on to their end, and so do processes where on_fenced is "abandon".
            ended = (
                f"; jobs handed back: {moved.held}; others run them, and what {node_id} goes on with is not committed"
            )
        click.echo(f"{node_id} is draining; jobs handed over: {moved.listed}{ended}")


@cluster.command()
@click.argument("node", shell_complete=node_names)
@json_option
@pass_cluster
def resume(cluster: Cluster, node: str, as_json: bool) -> None:
    """Let a draining NODE take jobs again.

    NODE is an id, or what stands before the @ if only one node has that name.

    \b
    Example: celery -A cluster_tasks cluster resume gpu1@host
    """
    node_id = node_id_of(cluster, node)
    cluster.refuse_coordinator(node_id)
    cluster.resume(node_id)
    if as_json:
        print_json({"node": node_id, "status": NodeStatus.ONLINE})
    else:
        click.echo(f"{node_id} takes jobs again")


@cluster.command()
@json_option
@pass_cluster
def rebalance(cluster: Cluster, as_json: bool) -> None:
    """Move waiting jobs from lists that are too long to nodes whose lists are shorter than their share.

    A list is too long above 1.2 of its node's share of the capacity. What runs, and what is bound to a node, stays.

    \b
    Example: celery -A cluster_tasks cluster rebalance
    """
    done = cluster.rebalance()
    if as_json:
        print_json({"moved": done.moved, "taken": dict(done.taken), "given": dict(done.given)})
    else:
        click.echo(f"jobs moved: {done.moved}" + "".join(f"; {count} to {node}" for node, count in done.given.items()))


@cluster.command()
@click.option("--rolling", is_flag=True, required=True, help="One after the other; there is no other way.")
@click.option("--data-dir", default="cluster-data", show_default=True, envvar="CLUSTER_DATA_DIR", show_envvar=True,
              help="That of cluster-tasks up.")  # fmt: skip
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS",
              help="How long running jobs of a node may take; else cluster_drain_timeout_s.")  # fmt: skip
@json_option
@pass_cluster
def restart(cluster: Cluster, rolling: bool, data_dir: str, timeout: float | None, as_json: bool) -> None:
    """Restart the nodes of a cluster-tasks up one after the other, while the others work.

    Each is drained (what does not end in time goes to others), stopped, started, and has to be online again before the
    next one goes; the coordinator is the last. If one does not come back the rest is left as it is.

    \b
    Example: celery -A cluster_tasks cluster restart --rolling --data-dir cluster-data
    """

    def tell(done: Any) -> None:
        if as_json:
            print_json(asdict(done), one_line=True)
        else:
            click.echo(f"{done.node} is back; jobs handed back: {done.handed_back}")

    check_runtime()
    symbol_by_name("workers.rolling:rolling_restart")(cluster, data_dir, timeout, tell)


@cluster.command()
@click.option(
    "--count", type=click.IntRange(1, UNDECODABLE_KEPT), default=20, show_default=True, help="At most so many."
)
@click.option("--drop", is_flag=True, help="Forget all of them instead.")
@json_option
@pass_cluster
def undecodable(cluster: Cluster, count: int, drop: bool, as_json: bool) -> None:
    """Show the messages that no node could read, the last first; they may hold arguments.

    \b
    Example: celery -A cluster_tasks cluster undecodable --count 5
    """
    if drop:
        dropped = cluster.drop_undecodable()
        if as_json:
            print_json({"dropped": dropped})
        else:
            click.echo(f"messages dropped: {dropped}")
        return
    kept = [message.decode(errors="backslashreplace") for message in cluster.undecodable(count)]
    if as_json:
        print_json(kept)
        return
    for message in kept:
        click.echo(printable(message))


@cluster.command()
@click.option("--queue", default="", help="Where they go; else to the queues that the app's own routes name.")
@json_option
@click.pass_context
def release(ctx: click.Context, queue: str, as_json: bool) -> None:
    """Give all jobs of the cluster back to Celery's own queues.

    For the way back: when Cluster(app) is out of the app, its workers find there what was listed, delayed or held. All
    nodes have to be stopped before. The line may still be in the app or not.

    \b
    Example: celery -A cluster_tasks cluster release
    """
    moved = cluster_of_or_new(ctx.obj.app).release(queue)
    if as_json:
        print_json({"released": moved})
    else:
        click.echo(f"jobs given back: {moved}")


def cluster_of_or_new(app: Celery) -> Cluster:
    """The cluster of an app, which it had if it has none any more."""
    try:
        return cluster_of(app)
    except ClusterError:
        return Cluster(app)


def _hostname(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        return check_node_id(host_format(default_nodename(value)))
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


@cluster.command()
@click.option("-n", "--hostname", metavar="NAME", default="coordinator@%h", show_default=True, callback=_hostname,
              help="Its node name, %h being the host.")  # fmt: skip
@click.option("-l", "--loglevel", type=click.Choice(("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), False),
              default="WARNING", show_default=True, help="The least that is logged.")  # fmt: skip
@pass_cluster
def coordinator(cluster: Cluster, hostname: str, loglevel: str) -> None:
    """Check the health of all nodes until it is stopped.

    The work of dead nodes goes to the living. Any number of coordinators may run, each under a name of its own.

    \b
    Example: celery -A cluster_tasks cluster coordinator -n coordinator2@%h -l INFO
    """
    check_runtime()
    # Asked now, a Redis that is away is told in one line; the worker would log a traceback.
    cluster.checks_done()
    worker = symbol_by_name("workers.coordinator:coordinator")(cluster.app, hostname, loglevel)
    worker.start()
    click.get_current_context().exit(worker.exitcode)
