"""``celery -A APP cluster events``, and what else tells what happens while it happens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from threading import Event
from typing import Any

import click

from cluster_tasks.broker.epochs import MAX_EVENTS
from cluster_tasks.cli.group import json_option, pass_cluster
from cluster_tasks.cli.live import until_ended
from cluster_tasks.cli.tables import Column, moment, print_json, print_rows
from cluster_tasks.cluster import Cluster
from cluster_tasks.failover.events import ClusterEvent
from cluster_tasks.model import NodeFilter
from cluster_tasks.registry.joined import OWN, JoinedEvent, JoinedRegistries

FOLLOW_S = 1.0
"""How long one read waits for news; less than the time-out of a socket."""
EVENT_COLUMNS = (Column("time", min_width=25), Column("kind", min_width=13), Column("facts"))
JOINED_COLUMN = Column("cluster", whole=True)
CHANGE_COLUMNS = (
    Column("time", min_width=25), Column("change", min_width=7), Column("id", whole=True), Column("status"),
    Column("serves"), Column("epoch", wide=True),
)  # fmt: skip


@click.command()
@click.option("--count", type=click.IntRange(1, MAX_EVENTS), default=20, show_default=True, help="How many at most.")
@click.option("--follow", is_flag=True, help="Go on with what happens until Ctrl-C; with --json an object a line.")
@json_option
@pass_cluster
def events(cluster: Cluster, count: int, follow: bool, as_json: bool) -> None:
    """Tell what happened in the cluster, the oldest first.

    \b
    Example: celery -A cluster_tasks cluster events --count 5 --follow
    """
    latest = cluster.events.latest(count)
    if as_json and not follow:
        print_json([asdict(event) for event in latest])
        return
    _print_events(latest, as_json)
    if follow:
        with until_ended():
            _follow(cluster, latest[-1].id if latest else "0", as_json)


def tell_changes(cluster: Cluster, where: NodeFilter, as_json: bool, joined: bool = False) -> None:
    """Tell of the nodes that pass ``where``: first those that exist, then who joins, changes and leaves.

    With ``joined`` also of those of the clusters that are joined to the view of this one.
    """
    if joined:
        changes = JoinedRegistries(lambda: {OWN: cluster.registry, **cluster.joined.registries}).watch(Event())
    else:
        changes = (JoinedEvent(OWN, event) for event in cluster.watch())
    columns = (JOINED_COLUMN, *CHANGE_COLUMNS) if joined else CHANGE_COLUMNS
    header = True
    with until_ended():
        for told in changes:
            event, node = told.event, told.event.node
            if not where.matches(node):
                continue
            if as_json:
                print_json(({"cluster": told.name} if joined else {}) | event.model_dump(mode="json"), one_line=True)
            else:
                cells = (moment(event.timestamp), event.type, node.id, node.status, sorted(node.serves), node.epoch)
                print_rows(columns, [(told.name, *cells) if joined else cells], header=header)
            header = False


def _follow(cluster: Cluster, position: str, as_json: bool) -> None:
    while True:
        if news := cluster.events.after(position, FOLLOW_S):
            _print_events(news, as_json, header=False)
            position = news[-1].id


def _print_events(found: Sequence[ClusterEvent], as_json: bool, *, header: bool = True) -> None:
    if as_json:
        for event in found:
            print_json(asdict(event), one_line=True)
    else:
        print_rows(EVENT_COLUMNS, [_event_cells(event) for event in found], header=header)


def _event_cells(event: ClusterEvent) -> tuple[str, str, str]:
    return moment(event.timestamp), event.kind, " ".join(f"{key}={_fact(fact)}" for key, fact in event.facts.items())


def _fact(fact: Any) -> str:
    # Quoted, whatever it holds: neither a tab nor an escape code reaches the terminal.
    return fact if isinstance(fact, str) and fact.isprintable() else json.dumps(fact)
