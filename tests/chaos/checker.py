"""One checker for all scenarios.

I1  every accepted job ends, once, and as it should
I2  at most one end of a job is committed, and at most one success of it is told
I3  nothing is committed under an epoch after its fence
I4  at every instant a job is in one place or has ended; at the end no key holds one, and none is left that nobody knows
I5  whoever was killed is noticed, once, and nobody else is; how long that took is collected
I6  a cluster without jobs is quiet
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import redis

from cluster_tasks.redis_store import text
from tests.chaos.census import take_census
from tests.chaos.history import History
from tests.chaos.jobs import ChaosJobs
from tests.chaos.load import Load
from tests.chaos.nodes import Kill
from tests.known_keys import strange_keys
from tests.process.accounts import held_key, left_over
from tests.waiting import wait_until

STANDSTILL_S = 60.0
"""With no job ending for so long, those that have not ended never will."""
IDLE_COMMANDS_PER_S = 100.0
"""Of one node without work: beats, reports, watching, and looking for work once a second."""


class Breach(AssertionError):
    """A promise was broken; the message begins with which."""


class Checker:
    """Holds the accounts of a scenario against the promises."""

    def __init__(
        self, jobs: ChaosJobs, history: History, standstill_s: float = STANDSTILL_S, notes: redis.Redis | None = None
    ) -> None:
        """``notes`` is where tasks note what they do, if that is another Redis."""
        self._jobs, self._history, self._standstill_s = jobs, history, standstill_s
        self._client, self._keys = jobs.cluster.client, jobs.cluster.keys
        self._notes = notes or self._client

    def check(self, load: Load, kills: Collection[Kill] = (), *, also_lost: Collection[str] = ()) -> None:
        """Stop the load, wait for the end of it, and check all but I6.

        ``also_lost`` are the ids of nodes that may have been taken for dead, because they were stopped or cut off.
        """
        load.stop()
        self.every_job_ends(load)
        self.nothing_is_committed_twice()
        self.no_fenced_epoch_commits()
        self.nothing_is_left()
        self.only_the_killed_are_lost(kills, also_lost)

    def every_job_ends(self, load: Load) -> None:
        """I1. Waits for the ends."""
        self._wait_for_ends(load)
        with_result = [job_id for job_id in load.expected if job_id not in load.silent]
        for job_id, state in zip(with_result, self._states(with_result), strict=True):
            if state != load.expected[job_id]:
                kind = load.kinds[job_id]
                raise Breach(f"I1: {kind} {job_id} was to end as {load.expected[job_id]}, its result says {state}")

    def nothing_is_committed_twice(self, *, told: bool = True) -> None:
        """I2. ``told``: and of no commit nodes told twice, as they do of one that Redis lost."""
        self._history.catch_up(self._client)
        commits = Counter(commit.job_id for commit in self._history.commits)
        successes = Counter(self._noted("succeeded") if told else ())
        for what, counts in (("committed", commits), ("told to have succeeded", successes)):
            twice = {job_id: times for job_id, times in counts.items() if times > 1}
            if twice:
                raise Breach(f"I2: {what} more than once: {twice}")

    def nothing_ran_twice(self, load: Load) -> None:
        """Where no node dies or is fenced, I2 holds for the work as well: nobody does it twice."""
        once = [job_id for job_id, kind in load.kinds.items() if kind not in ("retrying", "burning")]
        with self._notes.pipeline(transaction=False) as pipe:
            for job_id in once:
                pipe.llen(f"test:started:{job_id}")
            for job_id in load.retrying:
                pipe.llen(f"test:tried:{job_id}")
            counts = pipe.execute()
        ran = dict(zip([*once, *load.retrying], counts, strict=True))
        wrong = {job_id: times for job_id, times in ran.items() if times != (3 if job_id in load.retrying else 1)}
        if wrong:
            raise Breach(f"I2: ran another number of times than once, or three times for two retries: {wrong}")

    def no_fenced_epoch_commits(self) -> None:
        """I3."""
        self._history.catch_up(self._client)
        for commit in self._history.commits:
            fence = self._history.fences.get(commit.epoch)
            if fence is not None and commit.order > fence.order:
                raise Breach(
                    f"I3: job {commit.job_id} was committed by {fence.node_id} after the fence of {fence.epoch}"
                )

    def every_job_is_somewhere(self, load: Load) -> Counter[str]:
        """I4, now: no accepted job is nowhere, none in two places. Returns how many are in each place."""
        accepted = list(load.expected)
        census = take_census(self._jobs)
        for job_id in accepted:
            places = census.places.get(job_id, [])
            # The marker of an end without a result goes after some minutes.
            ended = job_id in census.ended or job_id in self._history.committed
            # The tail of a chain and the body of a chord are sent by the job before.
            if not places and not ended and job_id in load.first:
                raise Breach(f"I4: job {job_id} is nowhere and has not ended")
            if len(places) > 1 and not ended and job_id not in load.retrying:
                raise Breach(f"I4: job {job_id} is in {places}")
        return census.count()

    def nothing_is_left(self) -> None:
        """I4, at the end."""
        left: list[str] = ["?"]

        def nothing_is_left() -> bool:
            left[:] = left_over(self._jobs)
            return not left

        self._wait(nothing_is_left, "I4: the lists and records of jobs are empty", left)
        if strange := strange_keys(self._client, self._keys):
            raise Breach(f"I4: keys that nobody knows: {strange[:20]}")

    def only_the_killed_are_lost(self, kills: Collection[Kill], also_lost: Collection[str] = ()) -> None:
        """I5: each once. A node that had no work when it died may be noticed after the last job: waits for that."""
        lost: set[str] = set()

        def all_are_noticed() -> bool:
            lost.update(self.lost())
            return all(kill.epoch in self._history.moved for kill in kills)

        self._wait(all_are_noticed, "I5: every killed node is noticed, and its work moved", lost)
        false = self.lost() - {kill.node_id for kill in kills} - set(also_lost)
        if false:
            raise Breach(f"I5: nodes were taken for dead that lived: {sorted(false)}")

    def lost(self) -> set[str]:
        """The ids of the nodes that were taken for dead so far."""
        return {fence.node_id for fence in self._history.fences.values() if fence.ending == "lost"}

    def epoch_of(self, node_id: str) -> str:
        """The epoch of a node now; nothing between a fence and the next one."""
        beat = self._jobs.cluster.epochs.beats().get(node_id)
        return beat.epoch if beat else ""

    def wait_fenced(self, epoch: str) -> None:
        """Wait until an epoch is over."""
        wait_until(lambda: epoch in self._history.fences, self._standstill_s, f"the fence of {epoch}")

    def stale_commits(self) -> int:
        """How many commits were refused."""
        found: Any = self._client.hget(self._keys.counters, "stale_commits")
        return int(found or 0)

    def held_by(self, node_id: str) -> int:
        """How many jobs a node holds now."""
        return int(self._client.hlen(held_key(self._jobs, node_id)))

    def runs_on(self, node_id: str, load: Load) -> list[str]:
        """Ids of the jobs that have been begun on a node and not ended."""
        first = {job_id: self._client.lrange(f"test:started:{job_id}", 0, -1) for job_id in load.open_jobs}
        return [job_id for job_id, nodes in first.items() if node_id.encode() in nodes]

    def recovery(self, kills: Iterable[Kill]) -> list[tuple[float, float]]:
        """Seconds from each kill to the fence, and to when all of the node's work waited for living nodes."""
        history = self._history
        return [
            (history.fences[kill.epoch].at - kill.at, history.moved[kill.epoch] - kill.at)
            for kill in kills
            if kill.epoch in history.fences and kill.epoch in history.moved
        ]

    def the_cluster_is_quiet(self, nodes: int) -> None:
        """I6: Redis comes to have little to do for so many nodes that have no work."""
        rates: list[str] = []

        def is_quiet() -> bool:
            rate = self._commands_per_s() / nodes
            rates.append(f"{rate:.0f}")
            return rate <= IDLE_COMMANDS_PER_S

        self._wait(is_quiet, "I6: few commands a second for each idle node", rates)

    def _commands_per_s(self, during_s: float = 3.0) -> float:
        client = self._client
        before, began_s = int(client.info("stats")["total_commands_processed"]), time.monotonic()
        time.sleep(during_s)  # What is measured is a rate.
        commands = int(client.info("stats")["total_commands_processed"]) - before
        return commands / (time.monotonic() - began_s)

    def _wait_for_ends(self, load: Load) -> None:
        open_jobs = load.open_jobs
        moved_s = time.monotonic()
        while open_jobs:
            if time.monotonic() - moved_s > self._standstill_s:
                raise Breach(f"I1: {len(open_jobs)} jobs came to no end: {self._whereabouts(load, open_jobs)}")
            time.sleep(0.1)
            left = load.open_jobs
            if self._history.holes:
                left = [job_id for job_id in left if not self._client.exists(self._keys.terminal(job_id))]
            if len(left) != len(open_jobs):
                moved_s = time.monotonic()
            open_jobs = left

    def _whereabouts(self, load: Load, job_ids: list[str]) -> list[str]:
        places, first = take_census(self._jobs).places, job_ids[:10]
        return [
            f"{load.kinds[job_id]} {job_id}: {places.get(job_id, 'nowhere')}, {state}"
            for job_id, state in zip(first, self._states(first), strict=True)
        ]

    def _states(self, job_ids: list[str]) -> list[str]:
        backend = self._jobs.app.backend
        return [backend.get_task_meta(job_id)["status"] for job_id in job_ids]

    def _noted(self, note: str) -> list[str]:
        noted: Any = self._notes.lrange(f"test:{note}", 0, -1)
        return [text(item) for item in noted]

    def _wait(self, condition: Callable[[], bool], what: str, seen: Collection[str]) -> None:
        try:
            wait_until(condition, self._standstill_s)
        except AssertionError:
            raise Breach(f"{what}: not within {self._standstill_s:g} s: {sorted(seen)}") from None
