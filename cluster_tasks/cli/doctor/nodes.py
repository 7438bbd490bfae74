"""Checks of the nodes, of who watches them, and of the clocks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster_tasks.cli.doctor.facts import Checks, Facts, NodeState, Server, Unknown
from cluster_tasks.cli.doctor.findings import Finding, bad, ok, warn

CLOCK_S = 2.0
"""So far clocks may be apart."""
FAR_S = 60.0
"""From there on it is a mistake, and no drift."""
EJECTED = ("ejected", "half-open", "probing")
"""Limits of nodes that do their jobs worse than the others."""
SLOW_S = 0.5
"""What nodes do with the registry once in a heartbeat should take much less."""


def check_registry(facts: Facts) -> Iterator[Finding]:
    """Whether the service that knows the nodes answers."""
    registry, check = facts.registry, "registry.reach"
    if isinstance(facts.server, Unknown) and not facts.registry_apart:
        return
    if isinstance(registry, Unknown):
        yield bad(
            check, registry.why,
            "callers place jobs by their last view of the nodes and see no new ones; work and failover go on",
            "start it, open the way to it, or correct CLUSTER_REGISTRY_URL; "
            "then `celery -A APP cluster registry check`, which also writes",
        )  # fmt: skip
    elif registry.took_s > SLOW_S:
        yield warn(
            check, f"{registry.url} took {registry.took_s:.1f} s", "nodes report to it once in a heartbeat",
            "bring it nearer to the nodes, or relieve it",
        )  # fmt: skip
    else:
        yield ok(check, f"{registry.url}, {registry.took_s * 1000:.0f} ms")


def check_nodes(facts: Facts) -> Iterator[Finding]:
    """Whether the nodes beat, are known to the registry, and get what they could run."""
    if isinstance(facts.nodes, Unknown):
        return
    workers = [node for node in facts.nodes if not node.coordinator]
    standing = [node for node in facts.nodes if node.has_epoch]
    alive = [node for node in standing if node.beats]
    if silent := _names(node for node in standing if not node.beats):
        means = "their processes are dead, stopped or cut off from Redis"
        if alive:
            yield warn(
                "nodes.beats", f"no heartbeat for a lease of {facts.lease_s:g} s: {silent}",
                f"{means}; the others fence them and take their jobs",
                "look at the end of their logs; `celery -A APP cluster events` tells 'node lost' when they are fenced",
            )  # fmt: skip
        else:
            yield bad(
                "nodes.beats", f"no heartbeat for a lease of {facts.lease_s:g} s: {silent}",
                f"{means}, and nobody is left to take their jobs",
                "start a node: celery -A APP worker -n NAME@%h; it takes over what they had",
            )  # fmt: skip
    elif workers and alive:
        yield ok("nodes.beats", f"{len([node for node in workers if node.has_epoch])} nodes beat")
    if not isinstance(facts.registry, Unknown):
        yield from _registered(facts.nodes)
    if limited := _names(node for node in workers if node.limit in EJECTED):
        yield warn(
            "nodes.ejected", limited, "their jobs failed, or took much longer, where those of others did not",
            "look at their machines and logs; they are probed, and come back by themselves",
        )  # fmt: skip


def _registered(nodes: Sequence[NodeState]) -> Iterator[Finding]:
    if strangers := _names(node for node in nodes if node.has_epoch and node.beats and not node.registered):
        yield warn(
            "nodes.registered", f"the registry does not know {strangers}",
            "callers place no job on them; they take from waiting lists and from the others",
            "look in their logs for 'registry'; `celery -A APP cluster registry check` does what they do",
        )  # fmt: skip
    if gone := _names(node for node in nodes if node.registered and not node.has_epoch):
        yield warn(
            "nodes.registered", f"the registry still knows {gone}, who may not work any more",
            "callers may choose them; their jobs go to waiting lists instead",
            "start a node or a coordinator: within 20 s it removes them from the registry",
        )  # fmt: skip


def check_coordinators(facts: Facts) -> Iterator[Finding]:
    """Whether somebody checks the nodes, and does it."""
    if isinstance(facts.nodes, Unknown) or isinstance(facts.checks, Unknown) or isinstance(facts.registry, Unknown):
        # Who is a coordinator stands in the registry.
        return
    check = "coordinator"
    alive = [node.id for node in facts.nodes if node.coordinator and node.has_epoch and node.beats]
    if not alive:
        yield warn(
            check, "none",
            "the nodes watch each other, which takes up to a second more; nobody has collections compacted",
            "celery -A APP cluster coordinator, best on two machines",
        )  # fmt: skip
    elif not _has_checked(facts.checks):
        yield bad(
            check, f"{', '.join(alive)} beat, and have checked nothing for a lease",
            "the nodes watch each other meanwhile",
            "look at their logs, restart them, and see that nothing else consumes their control queue",
        )  # fmt: skip
    else:
        yield ok(check, ", ".join(alive))


def _has_checked(checks: Checks) -> bool:
    # Not only more: a Redis that was emptied begins to count anew.
    return checks.after != checks.before


def check_clocks(facts: Facts) -> Iterator[Finding]:
    """Whether the clocks of this machine, of Redis and of the nodes agree."""
    if not isinstance(facts.server, Server):
        return
    of_redis, nodes = facts.server.ahead_s, () if isinstance(facts.nodes, Unknown) else facts.nodes
    late_s = facts.lease_s + CLOCK_S
    # A report is a heartbeat old when the next comes: one of a clock that is right looks a little late.
    known = {node.id: node.ahead_s for node in nodes if node.beats and node.has_epoch and node.ahead_s is not None}
    wrong = {node_id: ahead_s for node_id, ahead_s in known.items() if not -late_s < ahead_s < CLOCK_S}
    ours = bool(known) and all(abs(ahead_s - of_redis) < late_s for ahead_s in known.values())
    if abs(of_redis) < CLOCK_S:
        yield ok("clock.redis", f"{of_redis:+.3f} s against this machine")
    else:
        level, whose = bad if abs(of_redis) >= FAR_S else warn, "this machine" if ours else "the machine of Redis"
        yield level(
            "clock.redis", f"{of_redis:+.1f} s against this machine",
            "jobs with countdown, eta or expires that are sent from here begin or end at the wrong time; "
            "failover does not go by these clocks",
            f"set the clock of {whose} by NTP (timedatectl set-ntp true)",
        )  # fmt: skip
    if ours and abs(of_redis) >= CLOCK_S:
        return
    if wrong:
        told = ", ".join(f"{node_id} {ahead_s:+.0f} s" for node_id, ahead_s in sorted(wrong.items()))
        yield (bad if max(map(abs, wrong.values())) >= FAR_S else warn)(
            "clock.nodes", f"{told} against this machine",
            "retries, expires and what is shown of these nodes are off by that; failover does not go by these clocks",
            "set the clocks of their machines by NTP (timedatectl set-ntp true)",
        )  # fmt: skip
    elif known:
        yield ok("clock.nodes", f"no report of {len(known)} nodes is off by more than {late_s:g} s")


def _names(nodes: Iterator[NodeState]) -> str:
    return ", ".join(sorted(node.id for node in nodes))
