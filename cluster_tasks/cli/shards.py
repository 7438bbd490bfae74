"""``celery -A APP cluster shards``: which nodes hold the shards of the collections."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import click

from cluster_tasks.cli.completing import collections, node_names, shard_names
from cluster_tasks.cli.group import ClusterGroup, json_option, node_id_of, pass_cluster
from cluster_tasks.cli.tables import Column, print_json, print_rows
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import CollectionNotFound, ConfigurationError, LayoutChanged, StoreUnavailable
from cluster_tasks.shards.assignments import Division
from cluster_tasks.shards.layout import MAX_SHARDS
from cluster_tasks.shards.placement import Shard
from cluster_tasks.tasks.ready_made import backends_of

COLUMNS = (
    Column("collection"), Column("shard", number=True), Column("holders"), Column("ready"), Column("rows", number=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardRow:
    """What is shown of a shard."""

    collection: str
    shard: int
    holders: list[str]
    """The primary first."""
    ready: list[str]
    rows: int | None
    """None: the store cannot be read from here."""


class _Place(click.ParamType[Shard]):
    name = "COLLECTION/NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        collection, separator, number = str(value).rpartition("/")
        if not (collection and separator and number.isascii() and number.isdigit()):
            self.fail(f"expected COLLECTION/NUMBER such as docs/0, not {value}", param, ctx)
        return Shard(collection, int(number))


@click.group(cls=ClusterGroup, invoke_without_command=True)
@json_option
@pass_cluster
def shards(cluster: Cluster, as_json: bool) -> None:
    """List the shards of all collections, or change where and how many they are.

    Holders are the nodes that are to have a shard in memory, the primary first; ready those that have it, and are asked
    first. A node that is ready and no holder has it until a new holder is ready. Rows are counted in the store, if
    cluster_data_dir can be read from here. With cluster_vector_url none of this is the cluster's, and it is refused.

    \b
    Example: celery -A cluster_tasks cluster shards --json
    """
    backends_of(cluster.app).check_sharded()
    if click.get_current_context().invoked_subcommand is not None:
        return
    found = [row for name in sorted(cluster.assignments.divisions()) for row in _rows(cluster, name)]
    if as_json:
        print_json([asdict(row) for row in found])
        return
    if not found:
        click.echo(
            "No shards are assigned to nodes. Those with the role cache hold them: CLUSTER_ROLES=worker,cache", err=True
        )
    cells = [
        (row.collection, str(row.shard), row.holders, row.ready, "" if row.rows is None else str(row.rows))
        for row in found
    ]
    print_rows(COLUMNS, cells)


def _rows(cluster: Cluster, collection: str) -> list[ShardRow]:
    found = cluster.assignments.whereabouts(collection)
    if found is None:
        return []
    generation = found.assigned.generation
    return [
        ShardRow(collection, number, list(nodes), sorted(found.ready[number]),
                 _count(cluster, Shard(collection, number), generation))
        for number, nodes in enumerate(found.assigned.nodes)
    ]  # fmt: skip


def _count(cluster: Cluster, shard: Shard, generation: int) -> int | None:
    with suppress(ConfigurationError, StoreUnavailable, CollectionNotFound, LayoutChanged):
        return backends_of(cluster.app).sharded.count(shard.collection, [shard.number], generation)
    return None


@shards.command()
@click.argument("shard", type=_Place(), shell_complete=shard_names)
@click.argument("node", shell_complete=node_names)
@json_option
@pass_cluster
def move(cluster: Cluster, shard: Shard, node: str, as_json: bool) -> None:
    """Let NODE hold shard NUMBER of COLLECTION in the place of its primary.

    A node that holds it already becomes its primary. The node that held it is asked until NODE is ready. It stays there
    while nodes and collections stay as they are; a move that a plan would take back at once, for balance, is refused.
    NODE is an id, or what stands before the @ if only one node has that name.

    \b
    Example: celery -A cluster_tasks cluster shards move docs/0 gpu1@host
    """
    holders = list(cluster.shard_manager.move(shard, node_id_of(cluster, node)).nodes[shard.number])
    if as_json:
        print_json({"collection": shard.collection, "shard": shard.number, "holders": holders})
    else:
        click.echo(f"{shard} is held by {', '.join(holders)}")


@shards.command()
@click.argument("collection", shell_complete=collections)
@click.argument("number", type=click.IntRange(1, MAX_SHARDS), metavar="N")
@json_option
@pass_cluster
def split(cluster: Cluster, collection: str, number: int, as_json: bool) -> None:
    """Divide COLLECTION into N shards, more or fewer than it has.

    It is searched meanwhile; writers wait. This process does the work, and reads and writes cluster_data_dir. If it is
    interrupted the collection stays as it was.

    \b
    Example: celery -A cluster_tasks cluster shards split docs 8
    """
    layout = backends_of(cluster.app).sharded.split(collection, number)
    cluster.assignments.announce(collection, Division(layout.generation, layout.shards))
    cluster.events.add("collection split", collection=collection, shards=layout.shards)
    if as_json:
        print_json({"collection": collection, "shards": layout.shards, "generation": layout.generation})
    else:
        click.echo(f"{collection} has {layout.shards} shards")
