"""Checks of the jobs that nobody is at work on, and of what else is kept. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cluster_tasks.cli.doctor.facts import Facts, Jobs, Unknown
from cluster_tasks.cli.doctor.findings import Finding, bad, ok, warn

MANY_CONTROL = 20
"""One task of each kind waits at most, and a few that somebody has sent by hand."""
SHOWN = 5
"""Names in one finding."""


def check_jobs(facts: Facts) -> Iterator[Finding]:
    """Whether all jobs are where somebody takes them."""
    jobs = facts.jobs
    if isinstance(jobs, Unknown):
        return
    nodes = () if isinstance(facts.nodes, Unknown) else facts.nodes
    alive = [node for node in nodes if node.has_epoch and node.beats]
    yield from _unserved(jobs, bool([node for node in alive if not node.coordinator]))
    yield from _remains(jobs, bool(alive))
    yield from _miscounted(jobs)
    yield from _delayed(jobs)
    yield from _set_aside(jobs)
    if jobs.control > MANY_CONTROL:
        yield warn(
            "jobs.control", f"{jobs.control} control tasks wait", "coordinators do not keep up, or there is none",
            "start a coordinator: celery -A APP cluster coordinator",
        )  # fmt: skip
    if not jobs.keys_seen_whole:
        yield warn(
            "jobs.keys", "Redis has too many keys to look at all their names in a few seconds",
            "jobs of epochs that no table names would not have been found",
            "look at who fills it; results leave after result_expires",
        )  # fmt: skip


def _unserved(jobs: Jobs, works: bool) -> Iterator[Finding]:
    if isinstance(jobs.unserved, Unknown):
        return
    for problem in jobs.unserved:
        yield bad(
            "jobs.served", problem, "jobs wait until such a node comes",
            "start a node that serves them, or correct CLUSTER_SERVES; see `celery -A APP cluster nodes`" if works
            else "start a node: celery -A APP worker -n NAME@%h",
        )  # fmt: skip
    if not jobs.unserved:
        yield ok("jobs.served", "every list with jobs has a node that takes from it")


def _remains(jobs: Jobs, alive: bool) -> Iterator[Finding]:
    known = [each for each in jobs.remains if each.fenced or each.opened]
    lost = [each for each in jobs.remains if not (each.fenced or each.opened)]
    if known:
        epochs = sorted({each.epoch for each in known})
        found = f"{sum(each.jobs for each in known)} jobs of epochs that have ended: {_some(epochs)}"
        if alive:
            yield warn(
                "jobs.orphans", found, "whoever watches gives them to others within about ten seconds",
                "look again in a minute; if they are still there, read the logs of nodes and coordinators",
            )  # fmt: skip
        else:
            yield bad(
                "jobs.orphans", found, "nobody lives who could give them to others",
                "start a node (celery -A APP worker -n NAME@%h) or a coordinator",
            )  # fmt: skip
    for each in lost:
        put_away = ":remains" in each.key
        table = each.key.partition(":")[0] + (":fenced" if put_away else ":opened")
        command = f"HSET {table} '{each.epoch}' 'closed 0 0'" if put_away else f"SADD {table} '{each.epoch}'"
        yield bad(
            "jobs.orphans", f"{each.jobs} jobs in {each.key}, an epoch that no table names",
            "nobody looks for them: Redis was restored from an old copy, or somebody deleted keys",
            f"redis-cli {command}: whoever watches gives them to others then",
        )  # fmt: skip
    if not jobs.remains:
        yield ok("jobs.orphans", "no jobs of epochs that have ended")


def _miscounted(jobs: Jobs) -> Iterator[Finding]:
    for each in jobs.miscounted:
        command = f"ZADD {jobs.index} {each.jobs} '{each.queue}'" if each.jobs else f"ZREM {jobs.index} '{each.queue}'"
        finding = warn if each.counted else bad
        yield finding(
            "jobs.index", f"{each.queue} has {each.jobs} jobs, and the index of lists says {each.counted}",
            "somebody else wrote to the list; nodes see only the jobs that the index counts",
            f"redis-cli {command}, while nobody sends jobs; and keep others from writing there",
        )  # fmt: skip


def _delayed(jobs: Jobs) -> Iterator[Finding]:
    if jobs.overdue:
        yield bad(
            "jobs.delayed", f"{jobs.overdue} of {jobs.delayed} delayed jobs should have begun",
            "whoever fetches brings them in, and nobody fetches",
            "start a node: celery -A APP worker -n NAME@%h",
        )  # fmt: skip
    else:
        yield ok("jobs.delayed", f"{jobs.delayed} delayed jobs, none overdue")


def _set_aside(jobs: Jobs) -> Iterator[Finding]:
    if jobs.undecodable:
        yield warn(
            "jobs.undecodable", f"{jobs.undecodable} messages that no node could read",
            "somebody else writes to these lists, or a producer of another version",
            "celery -A APP cluster undecodable; and with --drop when you have seen them",
        )  # fmt: skip
    if jobs.quarantined:
        yield warn(
            "jobs.quarantine", f"{jobs.quarantined} jobs in quarantine", "processes died of them, and nobody runs them",
            "celery -A APP cluster quarantine list, then show ID; fix it, and retry or drop",
        )  # fmt: skip


def check_locks(facts: Facts) -> Iterator[Finding]:
    """Which locks are held."""
    if isinstance(facts.server, Unknown) and not facts.registry_apart:
        return
    if isinstance(facts.locks, Unknown):
        yield warn(
            "locks.held", facts.locks.why, "who waits for a lock is told that the service is away",
            "start it, open the way to it, or correct CLUSTER_REGISTRY_URL: locks are where the nodes are registered",
        )  # fmt: skip
        return
    if eternal := [lock.name for lock in facts.locks if lock.endless]:
        yield bad(
            "locks.held", f"{_some(eternal)} without an end",
            "no lock of the cluster is without one; who waits waits for ever",
            "find out who wrote the key; if nobody is at work on it, delete it",
        )  # fmt: skip
        return
    held = [lock.name if lock.left_s is None else f"{lock.name} ({lock.left_s:.0f} s left)" for lock in facts.locks]
    yield ok("locks.held", f"{len(held)}: {_some(held)}" if held else "none")


def check_stores(facts: Facts) -> Iterator[Finding]:
    """Where results and cached values are kept."""
    if facts.results_apart:
        yield warn(
            "results.store", "another Redis than that of the jobs",
            "a result and the end of its job are two steps: after a crash between them the job is run again",
            "leave CLUSTER_RESULT_BACKEND out, or name another database of the broker's Redis",
        )  # fmt: skip
    else:
        yield ok("results.store", "with the jobs")
    if isinstance(facts.cache, Unknown):
        yield warn(
            "cache.reach", facts.cache.why, "everything is computed anew; jobs do not fail for it",
            "start it, open the way to it, or correct CLUSTER_CACHE_URL",
        )  # fmt: skip
    elif facts.cache_with_jobs:
        yield warn(
            "cache.reach", f"{facts.cache}, the Redis of the jobs",
            "noeviction, which the jobs need, keeps every value to its end: a full cache refuses jobs",
            "give the cache a Redis of its own with maxmemory and maxmemory-policy allkeys-lfu: CLUSTER_CACHE_URL",
        )  # fmt: skip
    elif facts.cache:
        yield ok("cache.reach", facts.cache)


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
