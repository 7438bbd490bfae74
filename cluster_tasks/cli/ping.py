"""``cluster-tasks ping``: whether a node works, told by the exit code; for the probes of Kubernetes and the like."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

import click
from celery import Celery
from celery.platforms import EX_FAILURE, EX_OK

from cluster_tasks.cli.group import find_cluster, node_id_of, told_in_one_line
from cluster_tasks.cluster import Cluster
from cluster_tasks.configuration import read_celeryconfig
from cluster_tasks.errors import BrokerUnavailable, ClusterError, NodeNotFound

EX_DRAINING = 3
BEYOND_LEASE_S = 5.0
"""For Redis to answer, or a name server: a probe that is killed for being late would count as a node that is dead."""
T = TypeVar("T")


class Answer(StrEnum):
    """How a node stands, in words that follow its id."""

    WORKS = "beats and takes jobs"
    DRAINING = "beats and is draining: nothing new is placed on it"
    SILENT = "does not beat: it will be fenced, and others do its jobs"
    FENCED = "was fenced or has left just now"


EXIT_CODES = {
    Answer.WORKS: EX_OK,
    Answer.DRAINING: EX_DRAINING,
    Answer.SILENT: EX_FAILURE,
    Answer.FENCED: EX_FAILURE,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--node", required=True, metavar="NODE",
              help="Its id, or what stands before the @ if only one node has that name; %h is this host.")  # fmt: skip
@click.option("--alive", is_flag=True, help="Ask only whether it is alive: let it drain, and Redis be away.")
@click.option("--app", default="", help="The Celery app, if it sets cluster_… keys itself; it is imported each time.")
def ping(node: str, alive: bool, app: str) -> None:
    """Wait until NODE has beaten once more, for a lease at most.

    Coordinators beat, too. Without --app the settings are those of the CLUSTER_* variables and of celeryconfig.py, and
    nothing of yours is imported. A probe that restarts a node should ask --alive: while Redis does not answer nobody
    can tell, and to restart all nodes would help nobody.

    \b
    Exit codes: 0 it beats and takes jobs, 1 it does not beat or is not
    known, 2 wrong usage, 3 it is draining, 69 Redis does not answer.
    With --alive: 0 where it would be 3 or 69.

    \b
    Example: cluster-tasks ping --node worker@%h --alive
    """
    with told_in_one_line(lambda: _cluster(app)):
        cluster = _cluster(app)
        cluster.check()
        try:
            node_id, answer = _within(cluster.settings.lease_s + BEYOND_LEASE_S, lambda: ask(cluster, node))
        except NodeNotFound as exc:
            raise ClusterError(f"{exc}: it has not joined yet, was fenced, or has left") from exc
        except BrokerUnavailable as exc:
            if not alive:
                raise
            click.echo(f"nobody can tell whether {node} beats, so it is taken for alive: {exc}")
            raise SystemExit(EX_OK) from None
    code = EXIT_CODES[answer]
    click.echo(f"{node_id} {answer}", err=code != EX_OK)
    raise SystemExit(EX_OK if alive and code == EX_DRAINING else code)


def ask(cluster: Cluster, node: str) -> tuple[str, Answer]:
    """Return the id of a node, and how it stands. Raises NodeNotFound, ClusterError or BrokerUnavailable.

    No clock of another machine is asked: its counter has to move while this looks, within a lease.
    """
    node_id, settings, clock = node_id_of(cluster, node), cluster.settings, cluster.clock
    first, until_s = cluster.epochs.look_at(node_id), clock.monotonic() + settings.lease_s
    while seen := cluster.epochs.look_at(node_id):
        beat, drains = seen
        if first is None or beat != first[0]:
            return node_id, Answer.DRAINING if drains else Answer.WORKS
        if clock.monotonic() > until_s:
            return node_id, Answer.SILENT
        time.sleep(settings.heartbeat_s / 4)
    return node_id, Answer.FENCED


def _cluster(app: str) -> Cluster:
    if app:
        return find_cluster(app)
    own = Celery("ping", set_as_current=False)
    read_celeryconfig(own)
    return Cluster(own)


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """Return what ``call`` does. Raises BrokerUnavailable if it takes longer; it is left to itself then."""
    answers: SimpleQueue[T | ClusterError] = SimpleQueue()

    def run() -> None:
        try:
            answers.put(call())
        except ClusterError as exc:
            answers.put(exc)

    Thread(target=run, name="ping", daemon=True).start()
    with suppress(Empty):
        answer = answers.get(timeout=limit_s)
        if isinstance(answer, ClusterError):
            raise answer
        return answer
    raise BrokerUnavailable(f"no answer in {limit_s:g} s")


if __name__ == "__main__":
    ping(prog_name="cluster-tasks ping")
