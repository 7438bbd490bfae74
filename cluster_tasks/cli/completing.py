"""What a shell is told when somebody presses Tab behind a word that stands for something in the cluster.

Redis is asked, for half a second at most. Whatever goes wrong, nothing is offered and nothing is printed: the line that
somebody writes is not the place for it.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import click
import redis
from celery.app.utils import find_app

from cluster_tasks.broker.epochs import EpochTable
from cluster_tasks.cluster import cluster_of
from cluster_tasks.keys import ANY_TYPE, Keys
from cluster_tasks.redis_store import connect, text
from cluster_tasks.shards.assignments import AssignmentTable

WITHIN_S = 0.5
MOST = 200
"""More than that nobody reads."""
PLAIN = re.compile(r"[\w.@:/-]+")
"""What is offered: bash puts words into the line as they are, and would run what stands in ``$(…)``."""
Read = Callable[[redis.Redis, Keys], Iterable[str]]
Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def completing(read: Read) -> Complete:
    """Return what Click asks for the words of a parameter; ``read`` tells all that there are."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        # What the user's module prints as it is imported would be taken for words.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                words = filter(PLAIN.fullmatch, sorted(_ask(ctx, read)))
                return [word for word in words if word.startswith(incomplete)][:MOST]
            except Exception:  # noqa: BLE001 - the user's module may raise anything.
                return []

    return complete


def _ask(ctx: click.Context, read: Read) -> Iterable[str]:
    # Behind celery -A, or an option of the command itself.
    name = ctx.params.get("app") or ctx.find_root().params.get("app")
    if name is None:
        return ()
    settings = cluster_of(find_app(name)).settings
    options: dict[str, Any] = {"socket_timeout": WITHIN_S, "socket_connect_timeout": WITHIN_S}
    url = settings.broker_url.get_secret_value()
    with connect(url, sentinel_master=settings.sentinel_master, **options) as client:
        return list(read(client, Keys(settings.name)))


def _nodes(client: redis.Redis, keys: Keys) -> Iterable[str]:
    """Names where they tell a node, else ids: bash takes the @ of an id for the end of a word."""
    ids = EpochTable(client, keys).beats()
    names = Counter(node_id.partition("@")[0] for node_id in ids)
    for node_id in ids:
        name = node_id.partition("@")[0]
        yield name if names[name] == 1 else node_id


def _request_types(client: redis.Redis, keys: Keys) -> Iterable[str]:
    found: Any = client.hvals(keys.serves)
    return {kind for types in found for kind in text(types).split(",")} - {"", ANY_TYPE}


def _collections(client: redis.Redis, keys: Keys) -> Iterable[str]:
    return AssignmentTable(client, keys).divisions()


def _shards(client: redis.Redis, keys: Keys) -> Iterable[str]:
    for collection, division in AssignmentTable(client, keys).divisions().items():
        yield from (f"{collection}/{number}" for number in range(division.shards))


def _quarantined(client: redis.Redis, keys: Keys) -> Iterable[str]:
    found: Any = client.zrange(keys.quarantined, 0, -1)
    return map(text, found)


node_names = completing(_nodes)
request_types = completing(_request_types)
collections = completing(_collections)
shard_names = completing(_shards)
quarantined_ids = completing(_quarantined)
