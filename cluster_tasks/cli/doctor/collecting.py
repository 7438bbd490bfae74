"""Looking at a cluster. Nothing is written; what cannot be found out is ``Unknown``, with the reason."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isinf
from typing import Any, TypeVar

import redis

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.cli.doctor.facts import (
    Checks,
    Facts,
    Jobs,
    LockHeld,
    Miscounted,
    NodeState,
    RegistryState,
    Remains,
    Server,
    SlowCommand,
    Unknown,
)
from cluster_tasks.clock import Clock
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import BrokerUnavailable, UnavailableError
from cluster_tasks.failover.problems import WORKING, problems
from cluster_tasks.keys import PRIORITY_SEPARATOR, Keys, priority_suffixes
from cluster_tasks.model import Node, NodeRole
from cluster_tasks.redis_store import foreign_errors, is_same_server, text

PACKAGES = ("celery", "kombu", "redis", "hiredis", "flower", "click")
SETTINGS = (
    "appendfsync", "client-output-buffer-limit", "maxclients", "min-replicas-to-write", "no-appendfsync-on-rewrite",
    "save", "stop-writes-on-bgsave-error", "tcp-keepalive", "timeout",
)  # fmt: skip
"""Of Redis, besides what INFO tells."""
ROUND_TRIPS = 5
WALK_S = 5.0
"""So long names of keys are looked at."""
WALKED_AT_ONCE = 1_000
SLOWEST = 32
OVERDUE_S = 10.0
"""A job whose time came is fetched within a second, where nodes have slots."""
T = TypeVar("T")


def collect(cluster: Cluster) -> Facts:
    """Look at a cluster, for a lease if a node looks dead. Raises ConfigurationError."""
    settings, broker_url = cluster.settings, cluster.settings.broker_url.get_secret_value()
    server = _known(lambda: read_server(cluster.client, cluster.clock))
    found = _known(lambda: _registered(cluster))
    registry, registered = (found, None) if isinstance(found, Unknown) else found
    nodes: Sequence[NodeState] | Unknown
    jobs: Jobs | Unknown
    checks: Checks | Unknown
    if isinstance(server, Unknown):
        nodes = jobs = checks = server
    else:
        watched = _known(lambda: _watch(cluster, registered or ()))
        nodes, checks = (watched, watched) if isinstance(watched, Unknown) else watched
        jobs = nodes if isinstance(nodes, Unknown) else _known(lambda: _jobs(cluster, registered, _alive(nodes)))
    results, cache = settings.result_backend, settings.cache_url
    return Facts(
        versions=_versions(),
        broker=str(settings.broker_url),
        server=server,
        nodes=nodes,
        registry=registry,
        checks=checks,
        jobs=jobs,
        locks=_known(lambda: _locks(cluster)),
        results_apart=results is not None and not is_same_server(results.get_secret_value(), broker_url),
        registry_apart=settings.registry_url is not None,
        cache=_known(lambda: _cache(cluster)),
        cache_with_jobs=cache is not None and is_same_server(cache.get_secret_value(), broker_url),
        lease_s=settings.lease_s,
        heartbeat_s=settings.heartbeat_s,
        max_message_bytes=settings.max_message_bytes,
    )


def _known(look: Callable[[], T]) -> T | Unknown:
    try:
        return look()
    except UnavailableError as exc:
        return Unknown(" ".join(str(exc).split()))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_server(client: redis.Redis, clock: Clock) -> Server:
    """Let a Redis tell about itself. Raises BrokerUnavailable."""
    with foreign_errors(BrokerUnavailable, "looking at Redis"):
        trips = [_ask_the_time(client, clock) for _ in range(ROUND_TRIPS)]
        return Server(
            info=client.info(),
            config=_allowed(lambda: _config(client)),
            slow=_allowed(lambda: _slow_commands(client, clock.time())),
            round_trip_s=statistics.median(took_s for took_s, _ in trips),
            # The quickest answer says it best.
            ahead_s=min(trips)[1],
        )


def _ask_the_time(client: redis.Redis, clock: Clock) -> tuple[float, float]:
    """Return how long the answer took, and how far the clock of Redis is ahead."""
    asked, began_s = clock.time(), clock.monotonic()
    answer: Any = client.time()
    took_s = clock.monotonic() - began_s
    return took_s, answer[0] + answer[1] / 1e6 - (asked + took_s / 2)


def _config(client: redis.Redis) -> dict[str, str]:
    # One by one: before 7.0 Redis takes one name at a time, and all of them would bring passwords along.
    found: dict[str, str] = {}
    for name in SETTINGS:
        told: Any = client.config_get(name)
        found |= {text(key): text(value) for key, value in told.items()}
    return found


def _allowed(read: Callable[[], T]) -> T | Unknown:
    """Read what a user of a managed Redis may often not."""
    try:
        return read()
    except redis.ResponseError as exc:
        return Unknown(f"Redis refuses: {exc}")


def _slow_commands(client: redis.Redis, now: float) -> list[SlowCommand]:
    found: Any = client.slowlog_get(SLOWEST)
    return [
        SlowCommand(
            name=text(entry["command"]).split(" ")[0].upper(),
            took_s=entry["duration"] / 1e6,
            age_s=now - entry["start_time"],
        )
        for entry in found
    ]


def _registered(cluster: Cluster) -> tuple[RegistryState, list[Node]]:
    settings, began_s = cluster.settings, cluster.clock.monotonic()
    nodes = list(cluster.registry.list())
    took_s = cluster.clock.monotonic() - began_s
    return RegistryState(url=str(settings.registry_url or settings.broker_url), took_s=took_s), nodes


def _watch(cluster: Cluster, registered: Collection[Node]) -> tuple[list[NodeState], Checks]:
    """Look at heartbeats until every node has beaten and every coordinator has checked, for a lease at most."""
    clock, settings = cluster.clock, cluster.settings
    coordinators = {node.id for node in registered if NodeRole.MASTER in node.roles}
    before, checked, until_s = cluster.epochs.beats(), cluster.checks_done(), clock.monotonic() + settings.lease_s
    while True:
        time.sleep(settings.heartbeat_s / 4)
        now, checks = cluster.epochs.beats(), Checks(before=checked, after=cluster.checks_done())
        still = {node_id for node_id, beat in now.items() if before.get(node_id) == beat}
        awaited = bool(still) or (checks.after == checked and bool(coordinators & now.keys()))
        if not awaited or clock.monotonic() >= until_s:
            break
    return list(_states(cluster, now, still, coordinators, registered)), checks


def _states(
    cluster: Cluster, beats: Mapping[str, Beat], still: Collection[str], coordinators: Collection[str],
    known: Collection[Node],
) -> Iterator[NodeState]:  # fmt: skip
    limits, by_id, now = cluster.epochs.lists().limits, {node.id: node for node in known}, cluster.clock.time()
    # What was read before the watch is as old as that took.
    fresh = _known(lambda: {node.id: node for node in cluster.registry.list()})
    reports = by_id if isinstance(fresh, Unknown) else fresh
    for node_id in sorted(beats.keys() | by_id.keys()):
        report, limit = reports.get(node_id), limits.get(cluster.keys.node_queue(node_id))
        beat = beats.get(node_id)
        yield NodeState(
            id=node_id,
            has_epoch=beat is not None,
            beats=node_id not in still,
            # One that has left meanwhile is in neither.
            registered=report is not None or isinstance(fresh, Unknown),
            coordinator=node_id in coordinators,
            limit=limit.phase.value if limit else "",
            ahead_s=report.last_seen - now if report and report.last_seen else None,
        )


def _alive(nodes: Sequence[NodeState]) -> frozenset[str]:
    return frozenset(node.id for node in nodes if node.has_epoch and node.beats)


def _jobs(cluster: Cluster, registered: Collection[Node] | None, alive: frozenset[str]) -> Jobs:
    client, keys, clock = cluster.client, cluster.keys, cluster.clock
    unserved: Sequence[str] | Unknown = Unknown("the registry does not answer")
    if registered is not None:
        coordinators = [node for node in registered if NodeRole.MASTER in node.roles]
        masters = {node.id for node in coordinators}
        working = [node for node in registered if node.id in alive - masters and node.status in WORKING]
        unserved = list(problems(keys, working, coordinators, cluster.epochs.lengths()))
    with foreign_errors(BrokerUnavailable, "looking at the jobs"):
        until_s = clock.monotonic() + WALK_S
        own, saw_own = _walk(client, clock, until_s, f"{keys.name}:remains*", f"{keys.unacked_prefix}*")
        lists, saw_lists = _walk(client, clock, until_s, f"{_queue_prefix(keys)}[nws]*", kind="list")
        answer: Any = client.time()
        with client.pipeline(transaction=False) as pipe:
            pipe.zcard(keys.delayed)
            pipe.zcount(keys.delayed, "-inf", answer[0] - OVERDUE_S)
            pipe.llen(keys.undecodable)
            pipe.zcard(keys.quarantined)
            pipe.llen(keys.control_queue)
            delayed, overdue, undecodable, quarantined, control = pipe.execute()
        return Jobs(
            unserved=unserved,
            remains=_lasting_remains(cluster, own),
            miscounted=_miscounted(client, keys, lists),
            index=keys.backlog,
            delayed=delayed,
            overdue=overdue,
            undecodable=undecodable,
            quarantined=quarantined,
            control=control,
            keys_seen_whole=saw_own and saw_lists,
        )


def _walk(
    client: redis.Redis, clock: Clock, until_s: float, *patterns: str, kind: str | None = None
) -> tuple[set[str], bool]:
    """Return the names of keys that match, and whether there was time to see them all."""
    found: set[str] = set()
    for pattern in patterns:
        cursor = -1
        while cursor:
            if clock.monotonic() > until_s:
                return found, False
            answer: Any = client.scan(max(cursor, 0), match=pattern, count=WALKED_AT_ONCE, _type=kind)
            cursor, names = answer
            found.update(map(text, names))
    return found, True


def _queue_prefix(keys: Keys) -> str:
    return keys.node_prefix.removesuffix("node.")


def _lasting_remains(cluster: Cluster, names: Collection[str]) -> list[Remains]:
    """Return what is left of epochs that have ended and is not moved within a lease."""
    clock, until_s = cluster.clock, cluster.clock.monotonic() + cluster.settings.lease_s
    while (found := list(_remains(cluster.client, cluster.keys, names))) and clock.monotonic() < until_s:
        time.sleep(cluster.settings.heartbeat_s / 4)
    return found


def _remains(client: redis.Redis, keys: Keys, names: Collection[str]) -> Iterator[Remains]:
    held = {name: _epoch_of(name, keys) for name in sorted(names)}
    # In one step: an epoch that is fenced between two reads would seem to be in no table.
    with client.pipeline() as pipe:
        pipe.hgetall(keys.epochs)
        pipe.hkeys(keys.fenced)
        pipe.smembers(keys.opened)
        for name in held:
            is_list = name.startswith(f"{keys.name}:remains:")
            pipe.llen(name) if is_list else pipe.hlen(name)
        epochs, fenced, opened, *lengths = pipe.execute()
    standing = {f"{keys.node_of(text(queue))}/{text(epoch)}" for queue, epoch in epochs.items()}
    ended, begun = set(map(text, fenced)), set(map(text, opened))
    for (name, epoch), count in zip(held.items(), lengths, strict=True):
        if count and (epoch not in standing or not name.startswith(keys.unacked_prefix)):
            yield Remains(epoch=epoch, key=name, jobs=count, fenced=epoch in ended, opened=epoch in begun)


def _epoch_of(name: str, keys: Keys) -> str:
    """Return ``<node id>/<epoch>`` of the name of a hash or list."""
    behind = name.removeprefix(f"{keys.name}:").partition(":")[2]
    return behind.partition(PRIORITY_SEPARATOR)[0].removesuffix(".bound")


def _miscounted(client: redis.Redis, keys: Keys, lists: Collection[str]) -> list[Miscounted]:
    counted: Any = client.zrange(keys.backlog, 0, -1)
    bases = {name.partition(PRIORITY_SEPARATOR)[0] for name in lists} | set(map(text, counted))
    suffixes, queues = priority_suffixes(), sorted(name for name in bases if keys.owns(name))
    # In one step, or jobs that move meanwhile would seem to be miscounted.
    with client.pipeline() as pipe:
        for queue in queues:
            pipe.zscore(keys.backlog, queue)
            for suffix in suffixes:
                pipe.llen(queue + suffix)
        replies = pipe.execute()
    width = 1 + len(suffixes)
    found = []
    for number, queue in enumerate(queues):
        score, *lengths = replies[number * width : (number + 1) * width]
        if sum(lengths) != int(score or 0):
            found.append(Miscounted(queue=queue, jobs=sum(lengths), counted=int(score or 0)))
    return found


def _locks(cluster: Cluster) -> list[LockHeld]:
    return [
        LockHeld(name=lock.name, left_s=lock.left_s, endless=lock.left_s is not None and isinf(lock.left_s))
        for lock in cluster.locks.held()
    ]


def _cache(cluster: Cluster) -> str:
    shared = cluster.caches.shared
    if shared is None:
        return ""
    shared.connection.pipeline([("PING",)], "looking at the cache")
    return str(cluster.settings.cache_url)
