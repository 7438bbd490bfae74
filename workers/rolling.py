"""Restarting the nodes of a cluster on one machine one after the other, while the others work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError, NodeNotFound, UnavailableError
from cluster_tasks.model import NodeStatus
from workers.local import BEYOND_DRAIN_S, COORDINATOR, JOIN_TIMEOUT_S, NODE, SPARE, last_words, local_node_id
from workers.supervision import ENDED, RUNNING, STOPPING, SupervisorClient, turn_to_change
from workers.up import interrupt_on_signals

LOOK_EVERY_S = 0.2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Restarted:
    """A node that has been restarted."""

    node: str
    epoch: str
    """The new one."""
    handed_back: int
    """Jobs that did not end in time, and that others run now."""


class RollingRestart:
    """The nodes of one ``cluster-tasks up``, its coordinator included, as its supervisord knows them."""

    def __init__(self, cluster: Cluster, directory: Path, drain_timeout_s: float, start_timeout_s: float) -> None:
        """Raises ClusterError if no ``up`` runs in this directory."""
        self._cluster, self._directory = cluster, directory.absolute()
        self._drain_timeout_s, self._start_timeout_s = drain_timeout_s, start_timeout_s
        self._supervisor = SupervisorClient(self._directory)

    def run(self, tell: Callable[[Restarted], None]) -> None:
        """Restart one after the other, the coordinator last, and ``tell`` of each.

        Before each all have to be online, so that never more than one is away. Raises ClusterError where one is not, or
        does not come back: then the rest is left as it is. Interrupted, it lets the node of its turn work on before it
        ends, or starts it again; interrupted once more, it does not.
        """
        self._supervisor.states()
        with turn_to_change(self._directory, wait=True):
            names = self._names()
            for name in sorted(names, key=lambda name: (name == COORDINATOR, len(name), name)):
                self._wait_for_all(names, name)
                tell(self._restart(name))

    def _names(self) -> list[str]:
        """Those that run or should; not those that are started when there is more to do."""
        states = self._supervisor.states()
        return [
            name
            for name, stands in states.items()
            if name.startswith((NODE, COORDINATOR))
            and not (self._supervisor.group(name) == SPARE and stands in (*ENDED, STOPPING))
        ]

    def _wait_for_all(self, names: Sequence[str], next_name: str) -> None:
        def away() -> list[str]:
            states = self._supervisor.states()
            return [
                f"{name} is {'not online' if states[name] == RUNNING else states[name]}"
                for name in names
                if states[name] != RUNNING or not self._epoch_online(name)
            ]

        if not _wait_for(lambda: not away(), self._start_timeout_s):
            raise ClusterError(
                f"{next_name} is not restarted, for others are away: {', '.join(away())} "
                f"in the cluster at {self._cluster.settings.broker_url} (CLUSTER_BROKER_URL names another)"
            )

    def _restart(self, name: str) -> Restarted:
        node_id, before = local_node_id(name), self._epoch_online(name)
        try:
            handed_back = self._cluster.drain(node_id, timeout_s=self._drain_timeout_s).held
            self._supervisor.stop(name)
            self._wait_for_end(name)
            self._supervisor.start(name)
        except BaseException:
            self._put_back(name, node_id)
            raise

        def is_back() -> bool:
            # The supervisor itself takes a program for started only after a while.
            return self._supervisor.states()[name] == RUNNING and self._epoch_online(name) not in ("", before)

        if not _wait_for(is_back, self._start_timeout_s):
            words = last_words(self._directory, name)
            raise ClusterError(
                f"{name} is not back after {self._start_timeout_s:g} s, and the rest is left as it is. It is "
                f"{self._supervisor.states()[name]}; its last words, in {self._directory}/logs/{name}.log: {words}"
            )
        epoch = self._epoch_online(name)
        self._cluster.events.add("node restarted", node=node_id, epoch=epoch, handed_back=handed_back)
        return Restarted(node_id, epoch, handed_back)

    def _wait_for_end(self, name: str) -> None:
        stop_s = self._cluster.settings.drain_timeout_s + 2 * BEYOND_DRAIN_S
        if not _wait_for(lambda: self._supervisor.states()[name] != STOPPING, stop_s):
            raise ClusterError(f"{name} was told to end {stop_s:g} s ago and has not")

    def _put_back(self, name: str, node_id: str) -> None:
        """Let a node work whose restart comes to nothing: nobody else would know that it is to."""
        self._wait_for_end(name)
        if self._supervisor.states()[name] in ENDED:
            self._supervisor.start(name)
            return
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            try:
                with suppress(NodeNotFound):
                    self._cluster.resume(node_id)
                return
            except UnavailableError:
                # What was away while the node drained may still be.
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_EVERY_S)

    def _epoch_online(self, name: str) -> str:
        """The epoch of a node that takes jobs; empty if it does not."""
        node_id = local_node_id(name)
        beat = self._cluster.epochs.beats().get(node_id)
        if beat is None or not beat.counter:
            return ""
        try:
            node = self._cluster.registry.get(node_id)
        except NodeNotFound:
            return ""
        works = node.status in (NodeStatus.ONLINE, NodeStatus.BUSY)
        return beat.epoch if works and node.epoch == beat.epoch else ""


def rolling_restart(
    cluster: Cluster, directory: str, drain_timeout_s: float | None, tell: Callable[[Restarted], None]
) -> None:
    """Restart the nodes of the ``cluster-tasks up`` in ``directory``; see RollingRestart.

    SIGTERM and SIGHUP interrupt it as Ctrl-C does.
    """
    interrupt_on_signals()
    timeout_s = cluster.settings.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
    RollingRestart(cluster, Path(directory), timeout_s, JOIN_TIMEOUT_S).run(tell)


def _wait_for(condition: Callable[[], T], within_s: float) -> T:
    """The first truthy value of ``condition``, or what it was at the end."""
    deadline = time.monotonic() + within_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    return value
