"""The nodes of a scenario: they come, die and are replaced while it goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, cycle
from types import TracebackType
from typing import Self

from cluster_tasks.broker.epochs import EpochTable
from tests.process.nodes import WorkerProcess
from tests.waiting import wait_until

START_S = 120.0
"""Several nodes that start at once share the machine with those that work."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A node was killed."""

    node_id: str
    epoch: str
    at: float
    """Seconds since 1970."""


class Nodes:
    """A crowd of workers with a number each, of which the given pools take turns. As a context it ends them all."""

    def __init__(
        self, make: Callable[[str, str], WorkerProcess], epochs: EpochTable, rng: random.Random, pools: tuple[str, ...]
    ) -> None:
        """``make`` makes a worker of a name and a pool."""
        self._make, self._epochs, self._rng = make, epochs, rng
        self._numbers, self._pools = count(1), cycle(pools)
        self._all: list[WorkerProcess] = []
        self.alive: list[WorkerProcess] = []
        """Started and not killed, ready or not."""
        self.kills: list[Kill] = []

    def add(self, number: int = 1) -> list[WorkerProcess]:
        """Start more nodes; they may not be ready yet."""
        new = [self._make(f"n{next(self._numbers)}", next(self._pools)) for _ in range(number)]
        for worker in new:
            self._all.append(worker)
            self.alive.append(worker.start())
        return new

    def wait_ready(self) -> list[WorkerProcess]:
        """Wait until every node that lives works."""
        for worker in self.alive:
            wait_until(lambda worker=worker: worker.is_ready() or worker.exit_code() is not None, START_S, worker.id)
            assert worker.exit_code() is None, worker.read_log()
        return list(self.alive)

    def working(self) -> list[WorkerProcess]:
        """Those that live and are ready."""
        return [worker for worker in self.alive if worker.is_ready() and worker.exit_code() is None]

    def wait_working(self, number: int) -> None:
        """Wait until so many nodes work."""
        wait_until(lambda: len(self.working()) >= number, START_S, f"{number} nodes work")

    def pick(self, number: int = 1) -> list[WorkerProcess]:
        """Choose nodes that work, at random."""
        return self._rng.sample(self.working(), number)

    def kill(self, *victims: WorkerProcess) -> list[Kill]:
        """SIGKILL, to all as nearly at once as can be; return what is known of them."""
        epochs = {node_id: beat.epoch for node_id, beat in self._epochs.beats().items()}
        done = []
        for victim in victims:
            self.alive.remove(victim)
            if victim.id in epochs:
                done.append(Kill(victim.id, epochs[victim.id], time.time()))
            victim.signal(signal.SIGKILL)
        for victim in victims:
            victim.kill()
        self.kills += done
        return done

    def dismiss(self, worker: WorkerProcess) -> None:
        """SIGTERM, and do not wait."""
        worker.signal(signal.SIGTERM)
        self.alive.remove(worker)

    def retire(self, worker: WorkerProcess) -> int | None:
        """SIGTERM, and wait until it has left."""
        code = worker.stop()
        self.alive.remove(worker)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all:
            if worker.exit_code() is None:
                worker.signal(signal.SIGCONT)
                worker.signal(signal.SIGTERM)
        for worker in self._all:
            worker.stop()
