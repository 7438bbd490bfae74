"""As many nodes on this machine as there is work for: starts them by supervisord, and drains them before they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster_tasks.broker.epochs import Beat
from cluster_tasks.cluster import Cluster
from cluster_tasks.errors import ClusterError, NodeNotFound
from cluster_tasks.keys import ANY_TYPE, Keys
from cluster_tasks.model import Node
from workers.scaling import Look, ScalePolicy, Since, decide
from workers.supervision import ENDED, STOPPING, SupervisorClient, turn_to_change

LOOK_EVERY_S = 1.0


class Autoscaler:
    """Starts and ends the nodes of one ``cluster-tasks up``.

    A node that is to go is drained, and ended when it holds nothing any more: it is never killed, and whatever it takes
    its jobs to end is waited for. If it is needed again before, it is resumed.
    """

    def __init__(
        self, cluster: Cluster, directory: Path, policy: ScalePolicy, names: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        """``names`` are those of the nodes for the supervisord of ``directory``, with their ids, the last to be started
        last. Raises ClusterError if it has no control socket there."""
        self._cluster, self._directory, self._policy, self._tell = cluster, directory, policy, tell
        self._supervisor = SupervisorClient(directory)
        self._ids = names
        self._leaving: set[str] = set()
        self._since = Since()
        self._next_s = 0.0
        self._problem = ""

    def look(self) -> None:
        """Look whether there are enough nodes, if that was not done lately. Never raises for want of a service."""
        if time.monotonic() < self._next_s:
            return
        try:
            with turn_to_change(self._directory, wait=False) as ours:
                if ours:
                    self._scale()
                else:
                    # A rolling restart wants all nodes at work but one.
                    self._resume(len(self._leaving))
                    self._since = Since()
            self._problem = ""
        except ClusterError as exc:
            if not self._problem:
                self._tell(f"The number of nodes stays as it is: {exc}")
            # What nobody saw has not lasted.
            self._since, self._problem = Since(changed=self._since.changed), str(exc)
        self._next_s = time.monotonic() + LOOK_EVERY_S

    def _scale(self) -> None:
        cluster, states = self._cluster, self._supervisor.states()
        lists, nodes = cluster.epochs.lists(), {node.id: node for node in cluster.nodes()}
        self._see_off(states, cluster.epochs.beats())
        # What somebody drains by hand is no help, and left to him.
        drained = {name for name, node_id in self._ids.items() if cluster.keys.node_queue(node_id) in lists.draining}
        gone = {name for name in self._ids if states[name] in (*ENDED, STOPPING)} | drained | self._leaving
        present = [name for name in self._ids if name not in gone]
        ours = {name: nodes[self._ids[name]] for name in present if self._ids[name] in nodes}
        if present and not ours:
            return  # They start, and nobody knows yet what they serve.
        waiting = jobs_for(list(ours.values()), list(nodes.values()), lists.lengths, cluster.keys)
        held = {name: node.load.current_connections for name, node in ours.items()}
        look = Look(time.monotonic(), len(present), sum(held.values()), waiting)
        self._since, wanted = decide(self._policy, self._since, look)
        if wanted > len(present):
            self._call(wanted - len(present), states, waiting)
        elif wanted < len(present) and (spare := list(ours)[self._policy.minimum :]):
            self._dismiss(min(reversed(spare), key=lambda name: held[name]))

    def _call(self, most: int, states: Mapping[str, str], waiting: int) -> None:
        called = self._resume(most)
        for name in [name for name in self._ids if states[name] in ENDED][: most - len(called)]:
            self._supervisor.start(name)
            called.append(name)
        if called:
            self._tell(f"Jobs wait, {waiting} of them: {', '.join(called)} to help")

    def _dismiss(self, name: str) -> None:
        self._cluster.drain(self._ids[name])
        self._leaving.add(name)
        self._tell(f"There is less to do: {name} drains, and ends then")

    def _resume(self, most: int) -> list[str]:
        """Let nodes that leave and still run take jobs again; return their names."""
        states = self._supervisor.states()
        resumed: list[str] = []
        for name in sorted(self._leaving):
            if len(resumed) < most and states[name] not in (*ENDED, STOPPING):
                try:
                    self._cluster.resume(self._ids[name])
                except NodeNotFound:
                    continue  # It has died, and is started again.
                self._leaving.discard(name)
                resumed.append(name)
        return resumed

    def _see_off(self, states: Mapping[str, str], beats: Mapping[str, Beat]) -> None:
        """End the nodes that leave and hold nothing any more."""
        for name in sorted(self._leaving):
            if states[name] in ENDED:
                self._leaving.discard(name)
                self._tell(f"{name} has ended")
            elif states[name] != STOPPING and (beat := beats.get(self._ids[name])) is not None:
                self._end_if_quiet(name, beat)

    def _end_if_quiet(self, name: str, beat: Beat) -> None:
        standing = self._cluster.draining.remaining(self._ids[name], beat.epoch)
        if not standing.drains:
            # It has died and come back, or somebody has resumed it, who did not mean this.
            self._cluster.drain(self._ids[name])
        elif not standing.held:
            self._supervisor.stop(name)


def jobs_for(ours: Sequence[Node], nodes: Sequence[Node], lengths: Mapping[str, int], keys: Keys) -> int:
    """Return how many of the jobs that wait nodes like ``ours`` could take, of all the lists by their ``lengths``."""
    serves = frozenset[str]().union(*(node.serves for node in ours))
    lists = {queue(kind) for kind in (*serves, ANY_TYPE) for queue in (keys.waiting_queue, keys.suspect_queue)}
    # Not their other lists: what is bound to a node waits for that one, however many there are.
    lists |= {keys.node_queue(node.id) for node in nodes if node.serves <= serves}
    return sum(lengths.get(queue, 0) for queue in lists)
