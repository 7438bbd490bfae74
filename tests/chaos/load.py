"""Jobs of all kinds, sent on and on, and what each of them must come to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import redis
from celery import chord, states
from celery.result import ResultSet
from kombu.exceptions import OperationalError

from cluster_tasks.errors import PartlySubmitted
from tests.chaos.history import History
from tests.chaos.jobs import ChaosJobs
from tests.process.traffic import Traffic

KINDS = ("plain", "prioritised", "delayed", "retrying", "chained", "chord", "silent", "throttled", "submitted")
LENGTHS_S = (0.0, 0.0, 0.05, 0.3)


class Load(Traffic):
    """Sends until it is stopped, a pause after each job, and waits while ``most_open`` jobs have not ended."""

    def __init__(
        self, jobs: ChaosJobs, history: History, rng: random.Random, *, kinds: Iterable[str] = KINDS,
        pause_s: float = 0.02, most_open: int = 150, lengths_s: tuple[float, ...] = LENGTHS_S,
    ) -> None:  # fmt: skip
        super().__init__(pause_s)
        self._jobs, self._history, self._rng, self._lengths_s = jobs, history, rng, lengths_s
        self._senders: dict[str, Callable[[], Any]] = {kind: getattr(self, f"_{kind}") for kind in kinds}
        self._most_open = most_open
        self.expected: dict[str, str] = {}
        """Job → the state in which it must end, of every job whose call returned. Grows; nothing leaves it."""
        self.kinds: dict[str, str] = {}
        """What kind each of them is."""
        self.first: set[str] = set()
        """Those that were sent by the call itself, and not by a job before them."""
        self.silent: set[str] = set()
        """Those that leave no result."""
        self.retrying: set[str] = set()
        """Those that are in two places while they are sent again."""
        self.refused = 0
        """Calls that raised, as they may in an outage."""

    @property
    def open_jobs(self) -> list[str]:
        """Ids of the jobs of which no end is known."""
        return [job_id for job_id in list(self.expected) if job_id not in self._history.committed]

    def send(self, number: int) -> None:
        if len(self.expected) - len(self._history.committed) >= self._most_open and self.open_jobs:
            return
        kind = self._rng.choice(list(self._senders))
        try:
            self.accept(self._senders[kind](), kind=kind)
        except PartlySubmitted as exc:
            self.accept(ResultSet(list(exc.results)), kind=kind)
            self.refused += 1
        except (OperationalError, redis.RedisError):
            self.refused += 1

    def accept(self, result: Any, state: str = states.SUCCESS, kind: str = "own") -> Any:
        """Take a job that the caller has sent into the account, with all that led to it; return its result."""
        last = result
        while result is not None:
            members = [member.id for member in getattr(result, "results", None) or [result]]
            self.kinds.update(dict.fromkeys(members, kind))
            self.expected.update(dict.fromkeys(members, state))
            result = result.parent
        self.first.update(members)
        return last

    def _run(self) -> None:
        # Ends are read from the history and by their keys: to have each announced is a burden, and nobody would listen.
        # Celery keeps a backend for each thread, so callers beside are not concerned.
        backend = self._jobs.app.backend
        backend.result_consumer.consume_from = lambda task_id: None
        try:
            super()._run()
        finally:
            backend.client.close()

    def _seconds(self) -> float:
        return self._rng.choice(self._lengths_s)

    def _plain(self) -> Any:
        return self._jobs.work.delay(self._seconds(), key=str(self._rng.randrange(5)))

    def _prioritised(self) -> Any:
        return self._jobs.work.apply_async((self._seconds(),), priority=self._rng.randrange(10))

    def _delayed(self) -> Any:
        return self._jobs.work.apply_async((self._seconds(),), countdown=self._rng.uniform(0, 2))

    def _retrying(self) -> Any:
        result = self._jobs.flaky.delay(2)
        self.retrying.add(result.id)
        return result

    def _chained(self) -> Any:
        work = self._jobs.work
        return (work.si(self._seconds()) | work.si(self._seconds())).apply_async()

    def _chord(self) -> Any:
        work = self._jobs.work
        return chord([work.si(self._seconds()) for _ in range(3)], self._jobs.gather.s()).apply_async()

    def _silent(self) -> Any:
        result = self._jobs.silent.delay(self._seconds())
        self.silent.add(result.id)
        return result

    def _throttled(self) -> Any:
        return self._jobs.throttled.delay(self._seconds())

    def _submitted(self) -> Any:
        sent = self._jobs.cluster.submit(self._jobs.work, [(self._seconds(),) for _ in range(8)])
        return ResultSet(list(sent))

    def _burning(self) -> Any:
        return self._jobs.burn.delay(self._rng.uniform(0.2, 1.0))

    def _hogging(self) -> Any:
        return self._jobs.hog.delay(3)
