"""Nodes whose ways to Redis, and to the registry, can be cut; what must hold while they are, and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.harness import Chaos
from tests.chaos.load import Load
from tests.chaos.partitions import Link
from tests.process.accounts import END_S
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until

CUTS = {
    "full": {"requests": True, "replies": True},
    "requests": {"requests": True, "replies": False},
    "replies": {"requests": False, "replies": True},
}
CUT_OFF_S = 8.0
"""Longer than any time-out of a node, so that all that it had asked for is given up when the network is whole again."""


@dataclass(frozen=True)
class Divided:
    """Nodes, each with the link over which it reaches the servers. Several may share one."""

    chaos: Chaos
    workers: list[WorkerProcess]
    links: list[Link]

    def behind(self, link: Link) -> list[str]:
        """The ids of the nodes that share a link."""
        return [worker.id for worker, own in zip(self.workers, self.links, strict=True) if own is link]

    def epochs(self, nodes: Sequence[str]) -> list[str]:
        """The epochs under which nodes work now; empty for one that does not."""
        beats = self.chaos.jobs.cluster.epochs.beats()
        return [beats[node].epoch if node in beats else "" for node in nodes]

    def started(self, nodes: Sequence[str]) -> list[int]:
        """How many jobs each of these nodes has ever started."""
        notes = self.chaos.notes
        who = [name for key in notes.scan_iter("test:started:*", count=1000) for name in notes.lrange(key, 0, -1)]
        return [who.count(node.encode()) for node in nodes]

    def cut_off(self, link: Link, how: str) -> None:
        """Cut nodes off until others have their work and all their time-outs have passed; then let them come back."""
        nodes, history = self.behind(link), self.chaos.history
        epochs = self.epochs(nodes)
        began_s = time.monotonic()
        link.cut(**CUTS[how])
        wait_until(lambda: all(epoch in history.fences for epoch in epochs), END_S, "they are fenced")
        started = self.started(nodes)
        wait_until(lambda: all(epoch in history.moved for epoch in epochs), END_S, "their work is moved")
        detected_s = time.monotonic() - began_s
        time.sleep(max(0.0, CUT_OFF_S - detected_s))
        assert self.started(nodes) == started, "who is cut off starts nothing once others may have its jobs"
        link.heal()
        healed_s = time.monotonic()
        wait_until(
            lambda: all(now not in ("", old) for now, old in zip(self.epochs(nodes), epochs, strict=True)),
            END_S, "they join anew",
        )  # fmt: skip
        wait_until(
            lambda: all(now > old for now, old in zip(self.started(nodes), started, strict=True)),
            END_S, "they work again",
        )  # fmt: skip
        back_s = time.monotonic() - healed_s
        print(f"{how}: their work was moved after {detected_s:.1f} s; healed, they worked after {back_s:.1f} s")

    def flap(self, seconds: float) -> None:
        """Cut links and heal them, again and again, for so long."""
        rng, until_s = self.chaos.rng, time.monotonic() + seconds
        while time.monotonic() < until_s:
            link, how = rng.choice(self.links), rng.choice(list(CUTS.values()))
            link.cut(**how)
            time.sleep(rng.uniform(0.05, 2))
            link.heal()
            time.sleep(rng.uniform(0.05, 1))

    def settle(self, load: Load, cut: Sequence[str]) -> None:
        """Let all come to its end, and check it; nodes in ``cut`` may have been lost."""
        self.chaos.checker.check(load, also_lost=set(cut))
        assert [worker.exit_code() for worker in self.workers] == [None] * len(self.workers)
