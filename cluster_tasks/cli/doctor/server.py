"""Checks of the Redis that holds the jobs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cluster_tasks.cli.doctor.facts import Facts, Server, Unknown
from cluster_tasks.cli.doctor.findings import Finding, Level, bad, ok, warn
from cluster_tasks.cli.doctor.software import version_of

LEAST_REDIS = (6, 2)
FULL = 0.75
"""Of its memory or its connections: from there on it is time to look."""
TOO_FULL = 0.9
ROUND_TRIP_S = 0.005
"""Placing a job takes one, and so does each fetch."""
LONG_ROUND_TRIP_S = 0.1
SLOW_COMMAND_S = 0.1
RECENTLY_S = 3600.0
MANY_SCRIPTS = 1_000
"""The cluster has a few dozen."""
RESULTS = "pubsub"
"""The class of clients that wait for results, in the limits of output buffers."""


def check_server(facts: Facts) -> Iterator[Finding]:
    """Whether the Redis of the jobs answers, and is set as a broker must be."""
    server = facts.server
    if isinstance(server, Unknown):
        yield bad(
            "redis.reach", f"{facts.broker} does not answer: {server.why}", "no job is placed, fetched or ended",
            "start it, open the way to it, or correct CLUSTER_BROKER_URL",
        )  # fmt: skip
        return
    yield ok("redis.reach", facts.broker)
    for check in CHECKS:
        yield from check(server, facts)


def _version(server: Server, _: Facts) -> Iterator[Finding]:
    found = str(server.info.get("redis_version", "unknown"))
    if version_of(found) < LEAST_REDIS:
        yield bad(
            "redis.version", found, "the scripts of the cluster use what came with 6.2", "upgrade it to 6.2 or later"
        )
    else:
        yield ok("redis.version", found)


def _role(server: Server, _: Facts) -> Iterator[Finding]:
    info = server.info
    if info.get("cluster_enabled"):
        yield bad(
            "redis.role", "a Redis Cluster", "its slots tear apart what one script must see together",
            "use a Redis without cluster-enabled as the broker; the cache may be one (CLUSTER_CACHE_URL)",
        )  # fmt: skip
    elif info.get("role") == "slave":
        yield bad(
            "redis.role", "a replica", "it refuses every write: no job is placed or ended",
            "name the master in CLUSTER_BROKER_URL, or sentinel://HOST:26379 that knows who it is",
        )  # fmt: skip
    elif info.get("loading"):
        yield bad(
            "redis.role", "it reads its data from disk", "it refuses all commands until that is done",
            "wait; INFO persistence tells loading_eta_seconds",
        )  # fmt: skip
    else:
        yield ok("redis.role", "a master")


def _eviction(server: Server, _: Facts) -> Iterator[Finding]:
    policy, limit = str(server.info.get("maxmemory_policy", "noeviction")), _number(server.info, "maxmemory")
    evicted = _number(server.info, "evicted_keys")
    remedy = "CONFIG SET maxmemory-policy noeviction, and the same line in redis.conf"
    found = f"maxmemory-policy {policy}, maxmemory {_megabytes(limit) if limit else 'without limit'}"
    if evicted and policy != "noeviction":
        yield bad(
            "redis.eviction", f"{found}; {evicted:.0f} keys were evicted since it started",
            "lists of jobs, results or the marks of jobs that have ended were thrown away",
            f"{remedy}; jobs whose callers still wait are to be sent again",
        )  # fmt: skip
    elif policy == "noeviction":
        yield ok("redis.eviction", found)
    elif limit:
        what = "a list of jobs" if policy.startswith("allkeys") else "a result, a lock or the mark that a job has ended"
        yield bad("redis.eviction", found, f"when its memory is full it throws away {what}", remedy)
    else:
        yield warn("redis.eviction", found, "it begins to throw away keys as soon as somebody sets maxmemory", remedy)


def _memory(server: Server, _: Facts) -> Iterator[Finding]:
    used, limit = _number(server.info, "used_memory"), _number(server.info, "maxmemory")
    machine = _number(server.info, "total_system_memory")
    of, share = ("maxmemory", used / limit) if limit else ("the machine", used / machine if machine else 0.0)
    found = f"{_megabytes(used)} used, {share:.0%} of {of}"
    means = (
        "full, it refuses every write: delay() raises, and ends of jobs wait" if limit
        else "the machine begins to swap, or its kernel ends Redis"
    )  # fmt: skip
    yield _by_share(
        "redis.memory", found, share, means,
        "look at result_expires and ignore_result, at `redis-cli --bigkeys` for who fills it, or give it more memory",
    )  # fmt: skip


def _persistence(server: Server, _: Facts) -> Iterator[Finding]:
    info, check = server.info, "redis.persistence"
    remedy = "CONFIG SET appendonly yes, and the same line in redis.conf"
    saves = _setting(server, "save")
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            yield bad(
                check, "the last write to the append-only file failed", "Redis refuses writes, or loses them",
                "look at the disk and the log of Redis",
            )  # fmt: skip
            return
        how = _setting(server, "appendfsync")
        if how == "no":
            yield warn(
                check, "appendonly yes, appendfsync no",
                "a crash of its machine loses what the kernel had not written, half a minute or so of jobs and results",
                "CONFIG SET appendfsync everysec, and the same line in redis.conf",
            )  # fmt: skip
        elif _setting(server, "no-appendfsync-on-rewrite") == "yes":
            yield warn(
                check, f"appendonly yes, appendfsync {how}, no-appendfsync-on-rewrite yes",
                "a crash of its machine during a rewrite loses all since the rewrite began",
                "CONFIG SET no-appendfsync-on-rewrite no, and the same line in redis.conf",
            )  # fmt: skip
        else:
            yield ok(check, f"appendonly yes, appendfsync {how or 'unknown'}")
    elif saves is None:
        yield warn(check, "appendonly no", "a restart loses what was written since the last snapshot", remedy)
    elif saves:
        yield warn(
            check,
            f"appendonly no, save {saves}",
            "a restart loses all jobs and results since the last snapshot",
            remedy,
        )
    else:
        yield bad(check, "appendonly no, save off", "a restart of Redis loses every job and every result", remedy)


def _snapshots(server: Server, _: Facts) -> Iterator[Finding]:
    if server.info.get("rdb_last_bgsave_status", "ok") == "ok":
        return
    refuses = bool(_setting(server, "save")) and _setting(server, "stop-writes-on-bgsave-error") != "no"
    yield Finding(
        "redis.snapshots", Level.BAD if refuses else Level.WARN, "the last snapshot failed",
        "Redis refuses every write until one succeeds" if refuses else "a restart would read an old snapshot",
        "look at the disk and the log of Redis: it needs room for a second copy, and vm.overcommit_memory=1",
    )  # fmt: skip


def _forks(server: Server, facts: Facts) -> Iterator[Finding]:
    forked_s = _number(server.info, "latest_fork_usec") / 1e6
    if forked_s > facts.lease_s / 3:
        yield warn(
            "redis.fork", f"its last fork took {forked_s:.1f} s",
            f"it stood still for so long; no node can beat meanwhile, and a lease is {facts.lease_s:g} s",
            "disable transparent huge pages on its machine, keep less in it, or raise CLUSTER_LEASE_S",
        )  # fmt: skip


def _replicas(server: Server, _: Facts) -> Iterator[Finding]:
    replicas, check = int(_number(server.info, "connected_slaves")), "redis.replicas"
    wanted = int(_setting(server, "min-replicas-to-write") or 0)
    found = f"{replicas} replicas, min-replicas-to-write {wanted}"
    if server.info.get("role") != "master":
        return
    if wanted > _number(server.info, "min_slaves_good_slaves", replicas):
        yield bad(
            check, found, "it refuses every write until so many replicas follow it",
            "start the replicas, or lower min-replicas-to-write",
        )  # fmt: skip
    elif replicas and not wanted:
        yield warn(
            check, found,
            "a master that was cut off goes on taking writes until it is demoted; what it took then is lost",
            "CONFIG SET min-replicas-to-write 1 and min-replicas-max-lag 1, and both lines in redis.conf",
        )  # fmt: skip
    else:
        yield ok(check, found)


def _connections(server: Server, _: Facts) -> Iterator[Finding]:
    open_, most = _number(server.info, "connected_clients"), int(_setting(server, "maxclients") or 0)
    most, check = most or int(_number(server.info, "maxclients")), "redis.connections"
    refused = _number(server.info, "rejected_connections")
    remedy = (
        "raise maxclients and the limit of open files (ulimit -n) of Redis, or look in CLIENT LIST for who has them"
    )
    if refused:
        yield warn(
            check, f"{open_:.0f} of {most}; {refused:.0f} were refused since it started",
            "nodes and callers were turned away", remedy,
        )  # fmt: skip
    elif most:
        found = f"{open_:.0f} of {most}"
        yield _by_share(check, found, open_ / most, "beyond that, nodes and callers are turned away", remedy)


def _idle(server: Server, _: Facts) -> Iterator[Finding]:
    timeout, check = int(_setting(server, "timeout") or 0), "redis.timeout"
    if timeout:
        yield warn(
            check, f"timeout {timeout}",
            f"Redis closes a connection that was idle for {timeout} s, and the next command of a caller fails",
            "CONFIG SET timeout 0, and the same line in redis.conf; tcp-keepalive finds the dead ones",
        )  # fmt: skip
    elif _setting(server, "tcp-keepalive") == "0":
        yield warn(
            check, "timeout 0, tcp-keepalive 0",
            "connections of machines that died are kept until maxclients is reached",
            "CONFIG SET tcp-keepalive 300, and the same line in redis.conf",
        )  # fmt: skip
    else:
        yield ok(check, "timeout 0")


def _buffers(server: Server, facts: Facts) -> Iterator[Finding]:
    limits, check = _buffer_limits(_setting(server, "client-output-buffer-limit") or ""), "redis.buffers"
    largest = facts.max_message_bytes
    for kind, means, wanted in (
        ("normal", "a node that fetches a large job is cut off, and its next fetch brings the same", "0 0 0"),
        (RESULTS, "a caller that waits for a large result is cut off", "32mb 8mb 60"),
    ):
        limit = limits.get(kind, 0)
        if 0 < limit < largest:
            yield warn(
                check, f"client-output-buffer-limit {kind} {limit}; a job may have {largest} bytes", means,
                f"CONFIG SET client-output-buffer-limit '{kind} {wanted}', and the same line in redis.conf, "
                "or lower CLUSTER_MAX_MESSAGE_BYTES",
            )  # fmt: skip


def _round_trip(server: Server, _: Facts) -> Iterator[Finding]:
    took_s, check = server.round_trip_s, "redis.round_trip"
    found = f"{took_s * 1000:.1f} ms"
    means = "placing, fetching and ending a job take a round trip each"
    remedy = "bring callers and nodes near to Redis; look at `redis-cli --latency` and at what else its machine does"
    if took_s > LONG_ROUND_TRIP_S:
        yield bad(check, found, means, remedy)
    elif took_s > ROUND_TRIP_S:
        yield warn(check, found, means, remedy)
    else:
        yield ok(check, found)


def _slow_commands(server: Server, _: Facts) -> Iterator[Finding]:
    if isinstance(server.slow, Unknown):
        return
    recent = [each for each in server.slow if each.took_s >= SLOW_COMMAND_S and each.age_s <= RECENTLY_S]
    if recent:
        slowest = max(recent, key=lambda each: each.took_s)
        names = ", ".join(sorted({each.name for each in recent}))
        yield warn(
            "redis.slow", f"in the last hour {names} took up to {slowest.took_s:.1f} s ({slowest.name})",
            "every job and every heartbeat waits while a command runs",
            "find out who sends it (SLOWLOG GET shows the client); no KEYS, no large SORT, nobody else's FLUSHALL",
        )  # fmt: skip


def _scripts(server: Server, _: Facts) -> Iterator[Finding]:
    kept = int(_number(server.info, "number_of_cached_scripts"))
    if kept > MANY_SCRIPTS:
        yield warn(
            "redis.scripts", f"{kept} scripts",
            "somebody makes scripts instead of giving them arguments; none is forgotten",
            "find out who sends EVAL, then SCRIPT FLUSH: the cluster sends its own again",
        )  # fmt: skip
    else:
        yield ok("redis.scripts", f"{kept} scripts")


def _readable(server: Server, _: Facts) -> Iterator[Finding]:
    if isinstance(server.config, Unknown):
        yield warn(
            "redis.config", server.config.why,
            "appendfsync, save, timeout and the limits of buffers and replicas are not checked",
            "give this user the command CONFIG|GET (ACL), or ask whoever runs Redis for these settings",
        )  # fmt: skip


CHECKS: tuple[Callable[[Server, Facts], Iterator[Finding]], ...] = (
    _version, _role, _readable, _eviction, _memory, _persistence, _snapshots, _forks, _replicas, _connections, _idle,
    _buffers, _round_trip, _slow_commands, _scripts,
)  # fmt: skip


def _by_share(check: str, found: str, share: float, means: str, remedy: str) -> Finding:
    if share > TOO_FULL:
        return bad(check, found, means, remedy)
    return warn(check, found, means, remedy) if share > FULL else ok(check, found)


def _number(info: Any, name: str, default: float = 0.0) -> float:
    value = info.get(name, default)
    return float(value) if isinstance(value, int | float) else default


def _setting(server: Server, name: str) -> str | None:
    """None: it is not known."""
    return None if isinstance(server.config, Unknown) else server.config.get(name)


def _buffer_limits(setting: str) -> dict[str, int]:
    """Return the hard limit of each class of clients, in bytes; 0 is none."""
    words = setting.split()
    return {kind: int(hard) for kind, hard in zip(words[::4], words[1::4], strict=False) if hard.isdigit()}


def _megabytes(count: float) -> str:
    return f"{count / 2**20:.0f} MB"
