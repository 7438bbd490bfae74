"""What the doctor makes of facts: each advice, from the facts that call for it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster_tasks.cli.doctor.command import examine
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
from cluster_tasks.cli.doctor.findings import EXIT_CODES, Finding, Level, worst
from cluster_tasks.cli.doctor.software import SUPPORTED, version_of

ROOT = Path(__file__).parents[2]
INFO: dict[str, Any] = {
    "redis_version": "7.0.15", "role": "master", "maxmemory_policy": "noeviction", "maxmemory": 2**30,
    "used_memory": 2**20, "total_system_memory": 2**33, "aof_enabled": 1, "connected_clients": 40,
    "number_of_cached_scripts": 30, "connected_slaves": 0,
}  # fmt: skip
CONFIG = {
    "appendfsync": "everysec", "save": "3600 1", "timeout": "0", "tcp-keepalive": "300", "maxclients": "10000",
    "min-replicas-to-write": "0", "no-appendfsync-on-rewrite": "no", "stop-writes-on-bgsave-error": "yes",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
}  # fmt: skip
WELL = Facts(
    versions={"python": "3.12.1", "celery": "5.7.0", "kombu": "5.7.1", "redis": "8.1.0", "flower": "2.2.0",
              "click": "8.3.1", "hiredis": "3.5.0"},
    broker="redis://10.0.0.5/0",
    server=Server(info=INFO, config=CONFIG, round_trip_s=0.0005),
    nodes=[NodeState(id="a@x", ahead_s=-0.4), NodeState(id="chief@x", coordinator=True, ahead_s=-0.4)],
    registry=RegistryState(url="redis://10.0.0.5/0", took_s=0.002),
    checks=Checks(before=10, after=12),
    cache="redis://10.0.0.6/0",
)  # fmt: skip


def of_redis(*, config: dict[str, str] | Unknown | None = None, **info: Any) -> Facts:
    settings = config if isinstance(config, Unknown) else {**CONFIG, **(config or {})}
    return replace(WELL, server=Server(info={**INFO, **info}, config=settings, round_trip_s=0.0005))


def of_jobs(**jobs: Any) -> Facts:
    return replace(WELL, jobs=Jobs(**jobs))


def of_nodes(*nodes: NodeState, **facts: Any) -> Facts:
    return replace(WELL, nodes=[*nodes, NodeState(id="chief@x", coordinator=True)], **facts)


def found(facts: Facts, check: str) -> list[Finding]:
    return [finding for finding in examine(facts) if finding.check == check]


def test_a_deployment_that_is_well_is_told_so_and_no_more() -> None:
    findings = examine(WELL)
    assert {finding.level for finding in findings} == {Level.OK}, findings
    assert not any(finding.means or finding.remedy for finding in findings)


SILENT = NodeState(id="a@x", beats=False)
LOST = Remains(epoch="a@x/1-q", key="cluster:unacked:a@x/1-q", jobs=3)
ADVICE: list[tuple[Facts, str, Level, str, str]] = [
    # versions
    (replace(WELL, versions={**WELL.versions, "celery": "5.8.0"}), "version.celery", Level.BAD, r"^5\.8\.0$",
     r"pip install 'celery>=5\.7,<5\.8'"),
    (replace(WELL, versions={**WELL.versions, "python": "3.10.9"}), "version.python", Level.BAD, "3.10.9", ">=3.11"),
    (replace(WELL, versions={name: WELL.versions[name] for name in WELL.versions if name != "hiredis"}),
     "version.hiredis", Level.WARN, "not installed", "redis\\[hiredis\\]"),
    # Redis
    (replace(WELL, server=Unknown("Connection refused")), "redis.reach", Level.BAD, "Connection refused",
     "CLUSTER_BROKER_URL"),
    (of_redis(redis_version="6.0.16"), "redis.version", Level.BAD, "6.0.16", "upgrade"),
    (of_redis(cluster_enabled=1), "redis.role", Level.BAD, "Cluster", "CLUSTER_CACHE_URL"),
    (of_redis(role="slave"), "redis.role", Level.BAD, "replica", "sentinel://"),
    (of_redis(loading=1), "redis.role", Level.BAD, "reads its data", "loading_eta_seconds"),
    (of_redis(maxmemory_policy="allkeys-lru"), "redis.eviction", Level.BAD, "allkeys-lru, maxmemory 1024 MB",
     "maxmemory-policy noeviction"),
    (of_redis(maxmemory_policy="volatile-lru"), "redis.eviction", Level.BAD, "volatile-lru", "noeviction"),
    (of_redis(maxmemory_policy="allkeys-lfu", maxmemory=0), "redis.eviction", Level.WARN, "without limit",
     "noeviction"),
    (of_redis(maxmemory_policy="allkeys-lru", evicted_keys=7), "redis.eviction", Level.BAD, "7 keys were evicted",
     "sent again"),
    (of_redis(used_memory=0.8 * 2**30), "redis.memory", Level.WARN, "80% of maxmemory", "result_expires"),
    (of_redis(used_memory=0.95 * 2**30), "redis.memory", Level.BAD, "95% of maxmemory", "more memory"),
    (of_redis(used_memory=0.8 * 2**33, maxmemory=0), "redis.memory", Level.WARN, "80% of the machine", "bigkeys"),
    (of_redis(aof_enabled=0, config={"save": ""}), "redis.persistence", Level.BAD, "save off", "appendonly yes"),
    (of_redis(aof_enabled=0), "redis.persistence", Level.WARN, "save 3600 1", "appendonly yes"),
    (of_redis(aof_enabled=0, config=Unknown("no")), "redis.persistence", Level.WARN, "appendonly no", "appendonly yes"),
    (of_redis(config={"appendfsync": "no"}), "redis.persistence", Level.WARN, "appendfsync no", "everysec"),
    (of_redis(config={"no-appendfsync-on-rewrite": "yes"}), "redis.persistence", Level.WARN, "rewrite yes",
     "no-appendfsync-on-rewrite no"),
    (of_redis(aof_last_write_status="err"), "redis.persistence", Level.BAD, "failed", "disk"),
    (of_redis(rdb_last_bgsave_status="err"), "redis.snapshots", Level.BAD, "failed", "overcommit_memory"),
    (of_redis(rdb_last_bgsave_status="err", config={"save": ""}), "redis.snapshots", Level.WARN, "failed", "disk"),
    (of_redis(latest_fork_usec=1_200_000), "redis.fork", Level.WARN, r"1\.2 s", "CLUSTER_LEASE_S"),
    (of_redis(connected_slaves=1), "redis.replicas", Level.WARN, "1 replicas", "min-replicas-to-write 1"),
    (of_redis(config={"min-replicas-to-write": "1"}), "redis.replicas", Level.BAD, "0 replicas", "start the replicas"),
    (of_redis(connected_slaves=1, min_slaves_good_slaves=0, config={"min-replicas-to-write": "1"}), "redis.replicas",
     Level.BAD, "1 replicas", "start the replicas"),
    (of_redis(connected_clients=8_000), "redis.connections", Level.WARN, "8000 of 10000", "maxclients"),
    (of_redis(connected_clients=9_900), "redis.connections", Level.BAD, "9900 of 10000", "CLIENT LIST"),
    (of_redis(rejected_connections=4), "redis.connections", Level.WARN, "4 were refused", "maxclients"),
    (of_redis(config={"timeout": "60"}), "redis.timeout", Level.WARN, "timeout 60", "CONFIG SET timeout 0"),
    (of_redis(config={"tcp-keepalive": "0"}), "redis.timeout", Level.WARN, "tcp-keepalive 0", "tcp-keepalive 300"),
    (of_redis(config={"client-output-buffer-limit": "normal 1048576 0 0 pubsub 33554432 8388608 60"}),
     "redis.buffers", Level.WARN, "normal 1048576", "normal 0 0 0"),
    (of_redis(config={"client-output-buffer-limit": "normal 0 0 0 pubsub 1048576 0 0"}), "redis.buffers", Level.WARN,
     "pubsub 1048576", "pubsub 32mb"),
    (of_redis(config=Unknown("Redis refuses: NOPERM")), "redis.config", Level.WARN, "NOPERM", r"CONFIG\|GET"),
    (of_redis(number_of_cached_scripts=5_000), "redis.scripts", Level.WARN, "5000", "SCRIPT FLUSH"),
    (replace(WELL, server=Server(info=INFO, config=CONFIG, round_trip_s=0.02)), "redis.round_trip", Level.WARN,
     r"20\.0 ms", "near to Redis"),
    (replace(WELL, server=Server(info=INFO, config=CONFIG, round_trip_s=0.2)), "redis.round_trip", Level.BAD,
     r"200\.0 ms", "--latency"),
    (replace(WELL, server=Server(info=INFO, config=CONFIG, slow=[SlowCommand(name="KEYS", took_s=0.5, age_s=60)])),
     "redis.slow", Level.WARN, r"KEYS took up to 0\.5 s", "SLOWLOG"),
    # registry, nodes, coordinators
    (replace(WELL, registry=Unknown("no answer")), "registry.reach", Level.BAD, "no answer", "registry check"),
    (replace(WELL, registry=RegistryState(url="consul://c", took_s=0.9)), "registry.reach", Level.WARN, r"0\.9 s",
     "nearer"),
    (of_nodes(SILENT), "nodes.beats", Level.WARN, "a@x", "node lost"),
    (replace(WELL, nodes=[SILENT]), "nodes.beats", Level.BAD, "a@x", "celery -A APP worker"),
    (of_nodes(NodeState(id="a@x", registered=False)), "nodes.registered", Level.WARN, "does not know a@x",
     "registry check"),
    (of_nodes(NodeState(id="a@x"), NodeState(id="b@x", has_epoch=False, beats=False)), "nodes.registered", Level.WARN,
     "still knows b@x", "within 20 s"),
    (of_nodes(NodeState(id="a@x", limit="half-open")), "nodes.ejected", Level.WARN, "a@x", "probed"),
    (replace(WELL, nodes=[NodeState(id="a@x")]), "coordinator", Level.WARN, "none", "cluster coordinator"),
    (replace(WELL, checks=Checks(before=7, after=7)), "coordinator", Level.BAD, "chief@x", "restart"),
    # clocks
    (replace(WELL, server=Server(info=INFO, config=CONFIG, ahead_s=5)), "clock.redis", Level.WARN, r"\+5\.0 s",
     "machine of Redis"),
    (replace(WELL, server=Server(info=INFO, config=CONFIG, ahead_s=-3600)), "clock.redis", Level.BAD, "-3600",
     "timedatectl"),
    (replace(WELL, server=Server(info=INFO, config=CONFIG, ahead_s=30), nodes=[NodeState(id="a@x", ahead_s=29.5)]),
     "clock.redis", Level.WARN, r"\+30\.0", "this machine"),
    (of_nodes(NodeState(id="a@x", ahead_s=9)), "clock.nodes", Level.WARN, r"a@x \+9 s", "NTP"),
    (of_nodes(NodeState(id="a@x", ahead_s=-600)), "clock.nodes", Level.BAD, "a@x -600 s", "NTP"),
    # jobs
    (of_jobs(unserved=["jobs wait in waiting.ocr, and no node that is online serves them"]), "jobs.served", Level.BAD,
     "waiting.ocr", "CLUSTER_SERVES"),
    (replace(of_jobs(unserved=["no worker node is online"]), nodes=[]), "jobs.served", Level.BAD, "no worker",
     "celery -A APP worker"),
    (of_jobs(remains=[replace(LOST, fenced=True)]), "jobs.orphans", Level.WARN, "3 jobs .* a@x/1-q", "in a minute"),
    (replace(of_jobs(remains=[replace(LOST, opened=True)]), nodes=[]), "jobs.orphans", Level.BAD, "a@x/1-q",
     "celery -A APP worker"),
    (of_jobs(remains=[LOST]), "jobs.orphans", Level.BAD, "no table names", "SADD cluster:opened 'a@x/1-q'"),
    (of_jobs(remains=[replace(LOST, key="cluster:remains_unacked:a@x/1-q")]), "jobs.orphans", Level.BAD, "remains",
     "HSET cluster:fenced 'a@x/1-q' 'closed 0 0'"),
    (of_jobs(miscounted=[Miscounted(queue="waiting.llm", jobs=4, counted=0)]), "jobs.index", Level.BAD,
     "has 4 jobs, .* says 0", "ZADD cluster:backlog 4 'waiting.llm'"),
    (of_jobs(miscounted=[Miscounted(queue="node.a@x", jobs=0, counted=2)]), "jobs.index", Level.WARN, "says 2",
     "ZREM cluster:backlog 'node.a@x'"),
    (of_jobs(delayed=9, overdue=2), "jobs.delayed", Level.BAD, "2 of 9", "celery -A APP worker"),
    (of_jobs(undecodable=1), "jobs.undecodable", Level.WARN, "1 messages", "--drop"),
    (of_jobs(quarantined=2), "jobs.quarantine", Level.WARN, "2 jobs", "quarantine list"),
    (of_jobs(control=50), "jobs.control", Level.WARN, "50", "cluster coordinator"),
    (of_jobs(keys_seen_whole=False), "jobs.keys", Level.WARN, "too many keys", "result_expires"),
    # what else is kept
    (replace(WELL, locks=[LockHeld(name="shard/docs/0", endless=True)]), "locks.held", Level.BAD, "shard/docs/0",
     "delete it"),
    (replace(WELL, locks=Unknown("no answer")), "locks.held", Level.WARN, "no answer", "CLUSTER_REGISTRY_URL"),
    (replace(WELL, results_apart=True), "results.store", Level.WARN, "another Redis", "CLUSTER_RESULT_BACKEND"),
    (replace(WELL, cache=Unknown("no answer")), "cache.reach", Level.WARN, "no answer", "CLUSTER_CACHE_URL"),
    (replace(WELL, cache_with_jobs=True), "cache.reach", Level.WARN, "the Redis of the jobs", "allkeys-lfu"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "check", "level", "told", "remedy"),
    ADVICE,
    ids=[f"{check}-{number}" for number, (_, check, *_) in enumerate(ADVICE)],
)
def test_what_is_not_well_is_told_with_what_to_do(
    facts: Facts, check: str, level: Level, told: str, remedy: str
) -> None:
    (finding,) = found(facts, check)
    assert finding.level is level
    assert re.search(told, finding.found), finding
    assert re.search(remedy, finding.remedy), finding
    assert finding.means


def test_each_advice_that_there_is_has_a_test() -> None:
    sources = (ROOT / "cluster_tasks/cli/doctor").glob("*.py")
    named = {name for path in sources for name in re.findall(r'"((?:\w+\.\w+|coordinator))"', path.read_text())}
    checks = {check for _, check, *_ in ADVICE} | {finding.check for finding in examine(WELL)}
    prefixes = ("redis.", "registry.", "nodes.", "clock.", "jobs.", "locks.", "results.", "cache.", "coordinator")
    assert {name for name in named if name.startswith(prefixes)} <= checks


def test_what_is_only_held_is_no_trouble() -> None:
    held = [LockHeld(name="shard/docs/0", left_s=12.4), LockHeld(name="in consul")]
    (finding,) = found(replace(WELL, locks=held), "locks.held")
    assert (finding.level, finding.found) == (Level.OK, "2: shard/docs/0 (12 s left), in consul")


def test_old_slow_commands_are_forgotten() -> None:
    old = SlowCommand(name="KEYS", took_s=9, age_s=7200)
    assert not found(replace(WELL, server=Server(info=INFO, config=CONFIG, slow=[old])), "redis.slow")


def test_without_redis_only_what_can_be_known_is_told() -> None:
    away = Unknown("Connection refused")
    facts = replace(WELL, server=away, nodes=away, registry=away, checks=away, jobs=away, locks=away)
    told = {finding.check for finding in examine(facts) if not finding.check.startswith("version.")}
    assert told == {"redis.reach", "results.store", "cache.reach"}
    told = {finding.check for finding in examine(replace(facts, registry_apart=True))}
    assert {"registry.reach", "locks.held"} <= told, "they are elsewhere, and looked at"


def test_without_the_registry_nobody_is_said_to_be_no_coordinator() -> None:
    facts = replace(WELL, registry=Unknown("away"), nodes=[NodeState(id="chief@x")])
    assert not found(facts, "coordinator")


def test_a_wrong_clock_of_this_machine_is_not_laid_to_the_nodes() -> None:
    server = Server(info=INFO, config=CONFIG, ahead_s=-100)
    facts = of_nodes(NodeState(id="a@x", ahead_s=-100.5), NodeState(id="b@x", ahead_s=-99.9), server=server)
    assert [finding.remedy for finding in found(facts, "clock.redis")] == [
        "set the clock of this machine by NTP (timedatectl set-ntp true)"
    ]
    assert not found(facts, "clock.nodes")


def test_the_worst_finding_is_the_exit_code() -> None:
    codes = [EXIT_CODES[worst(examine(facts))] for facts in (WELL, of_jobs(undecodable=1), of_jobs(overdue=1))]
    assert codes == [0, 1, 2]
    assert worst([]) is Level.OK


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("7.0.15", (7, 0, 15)), ("5.7.0rc1", (5, 7, 0)), ("7.2.4-debian", (7, 2, 4)), ("unknown", ()), ("8", (8,))],
)
def test_versions_are_compared_by_their_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_of(text) == numbers


def test_the_versions_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"python": project["requires-python"]}
    for requirement in project["dependencies"]:
        name, _, versions = re.match(r"([\w-]+)(\[\w+\])?(.*)", requirement).groups()  # type: ignore[union-attr]
        asked[name] = versions
    for name, (least, below) in SUPPORTED.items():
        wanted = [f">={'.'.join(map(str, least))}", *([f"<{'.'.join(map(str, below))}"] if below else [])]
        assert asked[name].split(",") == wanted, name
