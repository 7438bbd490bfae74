"""``celery -A APP cluster cache …``: what is kept, how much it helps, and how to be rid of it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from rich.progress import Progress

from cluster_tasks.cache.base import check_keys, check_namespace
from cluster_tasks.cache.caches import DEFAULT_NAMESPACE
from cluster_tasks.cache.patterns import compile_pattern
from cluster_tasks.cli.group import ClusterGroup, json_option, pass_cluster
from cluster_tasks.cli.tables import Column, print_json, print_rows, printable
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ConfigurationError, InvalidArguments

NUMBERS = (
    "hits", "misses", "hit_percent", "bytes", "saved_s", "warmed", "evictions", "corrupt", "too_large", "errors"
)  # fmt: skip
MAY_BE_UNKNOWN = {"redis.evictions", "local.too_large"}
"""A user of Redis may be kept from asking for them; memory has no bound for one value."""
COLUMNS = (Column("tier", whole=True), *(Column(name, number=True) for name in NUMBERS))
TIERS = ("local", "redis")
TEXTS_A_JOB = 64
JOBS_AT_ONCE = 8
"""Of which the results are awaited."""
EMBEDDINGS = "embeddings"
"""The namespace in which vectors are kept."""
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
    with. evictions of Redis are those of all that it holds, since it began.

    \b
    Example: celery -A cluster_tasks cluster cache stats --json
    """
    counted = _configured(cluster).caches.sums()
    tiers = {tier: _of_tier(counted, tier) for tier in TIERS}
    values = {name.removeprefix("values."): number for name, number in counted.items() if name.startswith("values.")}
    if as_json:
        print_json({**tiers, "values": values})
        return
    shown = lambda number: "" if number is None else f"{number:g}"  # noqa: E731
    print_rows(COLUMNS, [(tier, *map(shown, facts.values())) for tier, facts in tiers.items()])
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
    chosen = _namespace(cluster, namespace)
    with _arguments():
        check_keys([key])
    # A cache that is away is no miss here.
    chosen.state()
    entry = chosen.read([key]).entries.get(key)
    if entry is None:
        click.echo(f"there is no {printable(key)!r} in {namespace}; another namespace? --namespace NAME", err=True)
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
    chosen = _namespace(cluster, namespace)
    with _arguments():
        check_keys(keys)
    _tell("deleted", chosen.delete(*keys), as_json)


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
    with _arguments():
        compile_pattern(pattern)
    if not yes:
        _confirm(f"Forget what matches {printable(pattern)} in {namespace}?")
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
    from cluster_tasks.tasks.kept import kept_of

    app, chosen = _configured(cluster).app, _namespace(cluster, EMBEDDINGS)
    embed, kept = app.tasks[EMBED], kept_of(app)
    assert kept is not None
    chosen.state()
    texts = list(dict.fromkeys(_lines(file)))
    embedded, under_way = 0, deque[tuple[int, Any]]()
    with Progress(disable=as_json) as progress:
        task = progress.add_task("Embedding", total=len(texts))
        for start in range(0, len(texts), TEXTS_A_JOB):
            some = texts[start : start + TEXTS_A_JOB]
            known = kept.find_vectors(some, None)
            progress.advance(task, len(known))
            if missing := [text for text in some if text not in known]:
                under_way.append((len(missing), embed.delay(missing)))
                embedded += len(missing)
            if len(under_way) == JOBS_AT_ONCE:
                progress.advance(task, _await(*under_way.popleft()))
        for count, result in under_way:
            progress.advance(task, _await(count, result))
    # What was embedded while the cache was away is not in it.
    chosen.state()
    if as_json:
        print_json({"texts": len(texts), "known": len(texts) - embedded, "embedded": embedded})
    else:
        click.echo(f"{len(texts)} texts: {len(texts) - embedded} were known, {embedded} were embedded")


def _await(count: int, result: Any) -> int:
    """Return the number of texts of a job when it has ended. Raises ClickException if it failed."""
    ended = result.get(propagate=False)
    if isinstance(ended, BaseException):
        raise click.ClickException(f"job {result.id} with {count} texts failed: {type(ended).__name__}: {ended}")
    return count


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
    with _arguments():
        tenant, _, own = check_namespace(name).rpartition("/")
    # The state is read with the first use, so that nothing is shown that is void.
    return _configured(cluster).caches.namespace(own, tenant=tenant, staleness_s=0.0)


@contextmanager
def _arguments() -> Iterator[None]:
    """Refuse in one line what cannot be a namespace, a key or a pattern."""
    try:
        yield
    except ValueError as exc:
        raise InvalidArguments(str(exc)) from None


def _confirm(question: str) -> None:
    """Go on if the answer is yes."""
    try:
        click.confirm(question, abort=True, err=True)
    finally:
        # In a pipe no Return key has ended the line of the question.
        if not sys.stdin.isatty():
            click.echo(err=True)


def _of_tier(counted: dict[str, float], tier: str) -> dict[str, float | None]:
    """Return the numbers of a tier; None: they are not known."""
    facts = {name: counted.get(f"{tier}.{name}", 0.0) for name in NUMBERS}
    asked = facts["hits"] + facts["misses"]
    unknown = dict.fromkeys(name for name in NUMBERS if f"{tier}.{name}" in MAY_BE_UNKNOWN - counted.keys())
    return {**facts, "hit_percent": round(100 * facts["hits"] / asked, 1) if asked else 0.0,
            "saved_s": round(facts["saved_s"], 1), **unknown}  # fmt: skip


def _tell(what: str, count: int, as_json: bool) -> None:
    if as_json:
        print_json({what: count})
    else:
        click.echo(f"{count} {what}")
