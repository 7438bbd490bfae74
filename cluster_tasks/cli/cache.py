"""``celery -A APP cluster cache …``: what is kept, how much it helps, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

import click
from rich.progress import Progress

from cluster_tasks.cache.caches import DEFAULT_NAMESPACE
from cluster_tasks.cli.group import ClusterGroup, json_option, pass_cluster
from cluster_tasks.cli.tables import Column, print_json, print_rows, printable
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ConfigurationError, InvalidArguments

NUMBERS = ("hits", "misses", "hit_percent", "bytes", "saved_s", "warmed", "evictions", "corrupt", "errors")
COLUMNS = (Column("tier", whole=True), *(Column(name, number=True) for name in NUMBERS))
TIERS = ("local", "redis")
TEXTS_A_JOB = 64
SHOWN = 500
"""Characters of a value."""
namespace_option = click.option(
    "--namespace", default=DEFAULT_NAMESPACE, show_default=True, metavar="NAME", help="TENANT/NAME of a tenant."
)


@click.group(cls=ClusterGroup)
def cache() -> None:
    """Look at what is kept in the cache of cluster_cache_url, delete from it, and fill it.

    \b
    Example: celery -A cluster_tasks cluster cache stats
    """


@cache.command()
@json_option
@pass_cluster
def stats(cluster: Cluster, as_json: bool) -> None:
    """Show what all processes have counted, in the processes' own memory (local) and in Redis.

    bytes are those of hits, saved_s the seconds that it took to compute them; warmed is what processes of nodes began
    with.

    \b
    Example: celery -A cluster_tasks cluster cache stats --json
    """
    counted = _configured(cluster).caches.sums()
    tiers = {tier: _of_tier(counted, tier) for tier in TIERS}
    values = {name.removeprefix("values."): number for name, number in counted.items() if name.startswith("values.")}
    if as_json:
        print_json({**tiers, "values": values})
        return
    print_rows(
        COLUMNS, [(tier, *(f"{facts[column.name]:g}" for column in COLUMNS[1:])) for tier, facts in tiers.items()]
    )
    click.echo(f"{values.get('computed', 0):g} values were computed, in {values.get('computed_s', 0):.1f} s")


@cache.command()
@click.argument("key")
@namespace_option
@json_option
@pass_cluster
def get(cluster: Cluster, key: str, namespace: str, as_json: bool) -> None:
    """Show the value of KEY, and how long it is fresh.

    \b
    Example: celery -A cluster_tasks cluster cache get report:7 --namespace reports
    """
    entry = _namespace(cluster, namespace).read([key]).entries.get(key)
    if entry is None:
        click.echo(f"there is no {printable(key)!r} in {namespace}", err=True)
        raise SystemExit(1)
    value = None if entry.value is None else entry.value.decode(errors="replace")
    facts = {"key": key, "namespace": namespace, "bytes": len(entry.value or b""), "left_s": round(entry.left_s, 1),
             "age_s": round(entry.age_s, 1), "cost_s": round(entry.cost_s, 3), "value": value}  # fmt: skip
    if as_json:
        print_json(facts)
        return
    freshness = f"fresh for {entry.left_s:.0f} s" if entry.is_fresh else "stale"
    click.echo(f"{facts['bytes']} bytes, {entry.age_s:.0f} s old, {freshness}")
    click.echo(printable("nothing: it is known that there is no such thing" if value is None else value[:SHOWN]))


@cache.command()
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@namespace_option
@json_option
@pass_cluster
def delete(cluster: Cluster, keys: tuple[str, ...], namespace: str, as_json: bool) -> None:
    """Forget keys, everywhere.

    \b
    Example: celery -A cluster_tasks cluster cache delete report:7 --namespace reports
    """
    _tell("deleted", _namespace(cluster, namespace).delete(*keys), as_json)


@cache.command()
@click.argument("pattern", default="*")
@namespace_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_cluster
def clear(cluster: Cluster, pattern: str, namespace: str, yes: bool, as_json: bool) -> None:
    """Forget the keys of a namespace that match PATTERN, all without one: * ? [ab] [^a], a backslash before others.

    \b
    Example: celery -A cluster_tasks cluster cache clear 'report:*' --namespace reports
    """
    chosen = _namespace(cluster, namespace)
    if not yes:
        click.confirm(f"Forget what matches {pattern} in {namespace}?", abort=True, err=True)
    _tell("cleared", chosen.clear(pattern), as_json)


@cache.command()
@click.argument("file", type=click.File(encoding="utf-8"))
@json_option
@pass_cluster
def warm(cluster: Cluster, file: TextIO, as_json: bool) -> None:
    """Have the texts of FILE, one a line, embedded by the nodes, so that they are known; - is the standard input.

    \b
    Example: celery -A cluster_tasks cluster cache warm questions.txt
    """
    # Every app knows the job once its module is there.
    from cluster_tasks.tasks.embedding import EMBED

    embed = _configured(cluster).app.tasks[EMBED]
    texts = list(dict.fromkeys(_lines(file)))
    known = embedded = 0
    with Progress(disable=as_json) as progress:
        under_way = []
        task = progress.add_task("Embedding", total=len(texts))
        for start in range(0, len(texts), TEXTS_A_JOB):
            some = texts[start : start + TEXTS_A_JOB]
            under_way.append((len(some), embed.delay(some)))
        for count, result in under_way:
            is_known = result.get()["cached"]
            known, embedded = known + count * is_known, embedded + count * (not is_known)
            progress.advance(task, count)
    if as_json:
        print_json({"texts": len(texts), "known": known, "embedded": embedded})
    else:
        click.echo(f"{len(texts)} texts: {known} were known, of {embedded} in jobs the others were embedded")


def _lines(file: TextIO) -> Iterator[str]:
    try:
        for line in file:
            if text := line.strip():
                yield text
    except UnicodeDecodeError as exc:
        raise InvalidArguments(f"{file.name} is not text in UTF-8: {exc}") from None


def _configured(cluster: Cluster) -> Cluster:
    if cluster.settings.cache_url is None:
        raise ConfigurationError("there is no cache: set cluster_cache_url (CLUSTER_CACHE_URL)")
    return cluster


def _namespace(cluster: Cluster, name: str) -> Any:
    tenant, _, own = name.rpartition("/")
    try:
        # The state is read with the first use, so that nothing is shown that is void.
        return _configured(cluster).caches.namespace(own, tenant=tenant, staleness_s=0.0)
    except ValueError as exc:
        raise InvalidArguments(str(exc)) from None


def _of_tier(counted: dict[str, float], tier: str) -> dict[str, float]:
    facts = {column.name: counted.get(f"{tier}.{column.name}", 0.0) for column in COLUMNS[1:]}
    asked = facts["hits"] + facts["misses"]
    return {**facts, "hit_percent": round(100 * facts["hits"] / asked, 1) if asked else 0.0,
            "saved_s": round(facts["saved_s"], 1)}  # fmt: skip


def _tell(what: str, count: int, as_json: bool) -> None:
    if as_json:
        print_json({what: count})
    else:
        click.echo(f"{count} {what}")
