"""``celery -A APP cluster registry …``: whether the registry that is configured can do what a cluster needs of it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue

import click
from celery.platforms import EX_FAILURE

from cluster_tasks.cli.group import ClusterGroup, json_option, pass_cluster
from cluster_tasks.cli.tables import Column, print_json, print_rows
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import NodeNotFound, UnavailableError
from cluster_tasks.model import EventType, Load, Node, NodeStatus
from cluster_tasks.registry.base import Registry

COLUMNS = (Column("check", whole=True), Column("result", whole=True), Column("found"), Column("remedy"))
SLOW_S = 0.5
"""What nodes do with the registry once in a heartbeat should take much less."""
CLOCK_S = 2.0
"""So far the clock of a node may be off before it is told of."""
TOLD_S = 10.0
"""A watch that does not tell of a change for so long does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found, and what to do about it if it is not well."""

    check: str
    ok: bool
    found: str = ""
    remedy: str = ""


@click.group(cls=ClusterGroup)
def registry() -> None:
    """Look after the service that knows the nodes: CLUSTER_REGISTRY_URL, by default the Redis of the jobs.

    \b
    Example: celery -A cluster_tasks cluster registry check
    """


@registry.command()
@json_option
@pass_cluster
def check(cluster: Cluster, as_json: bool) -> None:
    """Do what nodes and callers do with the registry; exit with 1 if something does not work.

    For a moment this registers a node registry-check-…, which serves nothing.

    \b
    Example: celery -A cluster_tasks cluster registry check
    """
    findings = list(examine(cluster))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [(each.check, "ok" if each.ok else "failed", each.found, each.remedy) for each in findings]
        print_rows(COLUMNS, rows)
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(EX_FAILURE)


def examine(cluster: Cluster) -> Iterator[Finding]:
    """Yield what each check finds. What needs a check that has failed is left out."""
    kept, clock = cluster.registry, cluster.clock
    url = cluster.settings.registry_url or cluster.settings.broker_url
    began_s = clock.monotonic()
    try:
        nodes = kept.list()
    except UnavailableError as exc:
        yield Finding("list", False, str(exc), f"start it, open the way to it, or correct its address: {url}")
        return
    took_s = clock.monotonic() - began_s
    slow = "" if took_s < SLOW_S else "bring it nearer to the nodes, or relieve it"
    yield Finding("list", not slow, f"{len(nodes)} nodes in {took_s * 1000:.0f} ms", slow)
    yield from _life_of_a_node(kept)
    yield _clocks(nodes, clock.time())


def _life_of_a_node(kept: Registry) -> Iterator[Finding]:
    node = Node(id=f"registry-check-{secrets.token_hex(4)}", name="registry check", epoch="0")
    told: SimpleQueue[EventType] = SimpleQueue()
    stop = threading.Event()

    def follow() -> None:
        for event in kept.watch(stop):
            if event.node.id == node.id:
                told.put(event.type)

    def report() -> None:
        try:
            kept.beat(node.id, Load(), NodeStatus.OFFLINE)
        except NodeNotFound:
            # Nodes that live remove whoever does not beat in the Redis of the jobs, and this one never does.
            kept.register(node)
            kept.beat(node.id, Load(), NodeStatus.OFFLINE)

    steps: Sequence[tuple[str, EventType, Callable[[], None]]] = (
        ("register", EventType.JOINED, lambda: kept.register(node)),
        ("report", EventType.UPDATED, report),
        ("deregister", EventType.LEFT, lambda: kept.deregister(node.id, node.epoch)),
    )
    watching = threading.Thread(target=follow, name="registry-check", daemon=True)
    watching.start()
    try:
        for step, expected, do in steps:
            try:
                do()
            except UnavailableError as exc:
                yield Finding(step, False, str(exc), "let the user or token of the URL write there")
                return
            try:
                while told.get(timeout=TOLD_S) is not expected:
                    pass
            except Empty:
                found, remedy = f"a watch was not told {expected} within {TOLD_S:g} s", "cut no request that waits"
                yield Finding(step, False, found, f"let the user or token of the URL read there; {remedy}")
                return
            yield Finding(step, True, f"watches are told {expected}")
    finally:
        stop.set()
        watching.join()
        with suppress(UnavailableError):
            kept.deregister(node.id, node.epoch)


def _clocks(nodes: Sequence[Node], now: float) -> Finding:
    """By the last reports: one from the future comes from another clock."""
    ahead = {node.id: node.last_seen - now for node in nodes if node.last_seen > now + CLOCK_S}
    if not ahead:
        return Finding("clocks", True, f"no report is more than {CLOCK_S:g} s ahead of this machine")
    worst = max(ahead, key=lambda node_id: ahead[node_id])
    return Finding(
        "clocks", False, f"{worst} is {ahead[worst]:.0f} s ahead of this machine",
        "set the clocks by NTP; failover does not depend on them, but what is shown does",
    )  # fmt: skip
