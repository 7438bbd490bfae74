"""What all commands share: the cluster they speak of, how errors end them, ``--json``.

Exit codes: 0 done, 1 refused or degraded, 2 wrong usage, 69 Redis, the registry or the cache does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import isfinite
from typing import Any, Concatenate, ParamSpec

import click
import redis
from celery.app.utils import find_app
from celery.platforms import EX_UNAVAILABLE
from celery.utils.nodenames import gethostname

from cluster_tasks.cluster import Cluster, cluster_of
from cluster_tasks.errors import (
    CacheUnavailable,
    ClusterError,
    CollectionNotFound,
    JobNotFound,
    NodeNotFound,
    RegistryUnavailable,
    ShardNotFound,
    StoreUnavailable,
    UnavailableError,
)

P = ParamSpec("P")
LISTS: dict[type[ClusterError], str] = {
    NodeNotFound: "nodes", JobNotFound: "quarantine list", CollectionNotFound: "shards", ShardNotFound: "shards",
}  # fmt: skip
"""Which command lists what was not found."""


class Seconds(click.FloatRange):
    """A time in seconds, which is a number and comes to an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As of any range. Raises BadParameter also for nan, which is in every range, and for inf."""
        seconds = super().convert(value, param, ctx)
        if not isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds such as 2.5", param, ctx)
        return seconds


class ServiceUnavailable(click.ClickException):
    """Redis, the registry or the cache does not answer."""

    exit_code = EX_UNAVAILABLE


class ClusterGroup(click.Group):
    """Tells the errors of the cluster in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Raises ClickException for every ClusterError."""
        with told_in_one_line(lambda: cluster_of(ctx.obj.app)):
            return super().invoke(ctx)


@contextmanager
def told_in_one_line(find_cluster: Callable[[], Cluster]) -> Iterator[None]:
    """Turn every ClusterError into the ClickException that ends a command. The cluster names where its services are."""
    try:
        yield
    except UnavailableError as exc:
        raise ServiceUnavailable(_one_line(f"{exc} {_remedy(find_cluster(), exc)}")) from exc
    except ClusterError as exc:
        raise click.ClickException(_one_line(f"{exc}{_next_step(exc)}")) from exc


def _next_step(exc: ClusterError) -> str:
    """Say where to look, unless the error names the nearest."""
    lists = [command for kind, command in LISTS.items() if isinstance(exc, kind)]
    return f"; `celery -A APP cluster {lists[0]}` lists those that exist" if lists and "did you" not in str(exc) else ""


def _one_line(message: object) -> str:
    # Rich comes along with it, and a probe does without.
    from cluster_tasks.cli.tables import printable

    return printable(" ".join(str(message).split()))


def _remedy(cluster: Cluster, exc: UnavailableError) -> str:
    settings = cluster.settings
    if isinstance(exc, StoreUnavailable):
        place = settings.vector_url or f"{settings.data_dir}, from CLUSTER_DATA_DIR"
        return f"(the collections are in {place})"
    if isinstance(exc, RegistryUnavailable) and settings.registry_url:
        return f"(is the registry up at {settings.registry_url}? CLUSTER_REGISTRY_URL names another)"
    if isinstance(exc, CacheUnavailable):
        return f"(is the cache up at {settings.cache_url}? CLUSTER_CACHE_URL names another)"
    if isinstance(exc.__cause__, redis.exceptions.AuthenticationError):
        return f"(CLUSTER_BROKER_URL, {settings.broker_url}, names user and password)"
    return f"(is Redis up at {settings.broker_url}? CLUSTER_BROKER_URL names another)"


def pass_cluster(command: Callable[Concatenate[Cluster, P], None]) -> Callable[P, None]:
    """Give a command the cluster of the app after ``celery -A`` as its first argument."""

    @wraps(command)
    def with_cluster(*args: P.args, **kwargs: P.kwargs) -> None:
        cluster = cluster_of(click.get_current_context().obj.app)
        cluster.check()
        command(cluster, *args, **kwargs)

    return with_cluster


def node_id_of(cluster: Cluster, given: str) -> str:
    """Return the id of the one node of this id or name, %h being this host.

    Raises NodeNotFound, or ClusterError if there are several.
    """
    # Who runs a command in the container of a node has no shell that could say which host it is.
    given = given.replace("%h", gethostname())
    known = sorted(cluster.epochs.beats())
    if given in known:
        return given
    matches = [node_id for node_id in known if node_id.partition("@")[0] == given]
    if not matches:
        raise NodeNotFound(given, [name for node_id in known for name in (node_id, node_id.partition("@")[0])])
    if len(matches) > 1:
        raise ClusterError(f"{given!r} is the name of several nodes: give one of the ids {', '.join(matches)}")
    return matches[0]


def find_cluster(app: str) -> Cluster:
    """Return the cluster of an app by the name that ``celery -A`` takes. Raises ClusterError."""
    try:
        return cluster_of(find_app(app))
    except (ImportError, AttributeError) as exc:
        raise ClusterError(f"there is no Celery app {app!r}: {exc}; name it with --app MODULE") from None


app_option = click.option("--app", default="cluster_tasks", show_default=True, help="The Celery app, as for celery -A.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
