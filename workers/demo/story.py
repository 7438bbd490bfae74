"""The demo as it unfolds: index, send jobs, kill a node, wait for the end of every job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from celery import states
from kombu.utils.uuid import uuid
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster_tasks.errors import ClusterError
from cluster_tasks.model import Node
from workers.demo.corpus import Passage
from workers.demo.record import ACCEPTED, COMMITTED, EXECUTED, Record, redis_time_s
from workers.demo.report import Loss, Repetition, Report, report
from workers.demo.traffic import COLLECTION, OPTIMIZE, Job, indexing, mixed, repeated
from workers.local import LocalCluster

STILL_S = 180.0
"""Jobs are given up when none has ended for so long: many times what a failover may take."""
LOOK_EVERY_S = 0.1
QUIET_S = 3.0
"""When no end was told for so long, results are asked: a node may have died between the end of a job and telling it."""
KILL_AT = 0.1
"""Share of the jobs that have ended when a node is killed, if jobs wait in its list."""
KILL_ANYWAY_AT = 0.3
"""The same, if it only runs some: the nodes are faster than who sends."""


@dataclass(frozen=True, slots=True)
class _Kill:
    node: Node
    at_s: float
    """By Redis' clock, as all other times."""
    loss: Loss
    events_read: str
    """Position in the stream of the cluster's events."""


class Story:
    """One demo on a cluster that runs, told on ``console``."""

    def __init__(self, local: LocalCluster, console: Console) -> None:
        self._local, self._cluster, self._console = local, local.cluster, console
        self._record = Record(local.cluster.client, local.cluster.keys)
        # Celery does this in workers only.
        local.app.loader.import_default_modules()
        self._position = "0"
        self._kill: _Kill | None = None

    def index(self, passages: Sequence[Passage]) -> None:
        """Put all passages into the collection. Raises ClusterError if a job for it fails."""
        jobs = _with_ids(indexing(passages))
        sent = {job_id: job.task for job_id, job in jobs.items()}
        self._send(jobs)
        for _ in self._progress(sent):
            pass
        for job_id, state in self._states(sent).items():
            if state != states.SUCCESS:
                raise ClusterError(f"indexing failed: {state} {self._local.app.AsyncResult(job_id).result!r}")
        # As after every large change: until then words are looked up in what was added one by one.
        self._local.app.tasks[OPTIMIZE].delay(COLLECTION).get(timeout=STILL_S)
        self._console.print(f"{len(passages)} passages are indexed")

    def repeat(self, passages: Sequence[Passage]) -> Repetition | None:
        """Send the same jobs twice, and wait for their results; None if nothing is kept."""
        if self._cluster.settings.cache_url is None:
            return None
        jobs = repeated(passages)
        rates = []
        for _ in range(2):
            began_s = time.monotonic()
            results = [self._local.app.tasks[job.task].apply_async(kwargs=job.arguments) for job in jobs]
            for result in results:
                result.get(timeout=STILL_S)
            rates.append(round(len(jobs) / (time.monotonic() - began_s), 1))
        self._console.print(f"{len(jobs)} jobs were sent twice: {rates[0]:g} jobs/s, then {rates[1]:g}")
        return Repetition(len(jobs), *rates)

    def work(self, passages: Sequence[Passage], count: int, repetition: Repetition | None) -> Report:
        """Send ``count`` jobs, kill a node amid them, and wait until each job has ended or none does any more."""
        jobs = _with_ids(mixed(passages, count))
        sent = {job_id: job.task for job_id, job in jobs.items()}
        with ThreadPoolExecutor(1) as executor:
            # Beside the rest, for the nodes may be faster than this.
            sending = executor.submit(self._send, jobs)
            self._console.print(f"{count} jobs are on their way")
            for share in self._progress(sent):
                if self._kill is None and share >= KILL_AT:
                    self._kill = self._kill_one(share)
                self._look_for_failover()
            sending.result()
        outcome = self._states(sent)
        self._tell_failure(outcome)
        return report(
            outcome,
            [entry for entry in self._record.read(ACCEPTED) if entry.job_id in sent],
            self._record.read(EXECUTED),
            self._record.read(COMMITTED),
            self._kill.loss if self._kill else Loss(),
            self._local.plan.strategy,
            repetition,
        )

    def _send(self, jobs: Mapping[str, Job]) -> None:
        for job_id, job in jobs.items():
            self._local.app.tasks[job.task].apply_async(kwargs=job.arguments, task_id=job_id)
            self._record.note(ACCEPTED, job_id, job.task)

    def _progress(self, sent: dict[str, str]) -> Iterator[float]:
        """Yield the share of the jobs that have ended, until all have and a killed node's jobs are in new hands."""
        open_ids = set(sent)
        moved_at_s = asked_at_s = time.monotonic()
        columns = TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            names = sorted(set(sent.values()))
            bars = {name: progress.add_task(name, total=list(sent.values()).count(name)) for name in names}
            while open_ids or self._failing_over():
                ended = self._told_ends()
                if not ended and time.monotonic() - max(asked_at_s, moved_at_s) > QUIET_S:
                    ended = [each for each, state in self._states(open_ids).items() if state in states.READY_STATES]
                    asked_at_s = time.monotonic()
                if ended:
                    moved_at_s = time.monotonic()
                for job_id in open_ids.intersection(ended):
                    open_ids.remove(job_id)
                    progress.advance(bars[sent[job_id]])
                yield 1 - len(open_ids) / len(sent)
                if time.monotonic() - moved_at_s > STILL_S:
                    break

    def _told_ends(self) -> list[str]:
        entries = self._record.read(COMMITTED, self._position, LOOK_EVERY_S)
        if entries:
            self._position = entries[-1].position
        return [entry.job_id for entry in entries]

    def _kill_one(self, share: float) -> _Kill | None:
        """Kill the node that holds most, if it runs jobs while others wait in its list; later, if it only runs some."""
        holding = [(self._held(node), node) for node in self._cluster.nodes()]
        (running, listed), node = max(holding, key=lambda item: sum(item[0]))
        if not running or not (listed or share >= KILL_ANYWAY_AT):
            return None
        pid = self._local.supervisor.pids()[node.name]
        events = self._cluster.events.latest(1)
        seconds, microseconds = self._cluster.client.time()
        # It may have done meanwhile what it had, so it is stopped for the last look.
        os.kill(pid, signal.SIGSTOP)
        running, listed = self._held(node)
        if not running:
            os.kill(pid, signal.SIGCONT)
            return None
        os.kill(pid, signal.SIGKILL)
        self._console.print(f"{node.id} is killed: it ran {running} jobs, and {listed} were in its list")
        loss = Loss(node.id, running + listed)
        return _Kill(node, seconds + microseconds / 1e6, loss, events[-1].id if events else "0")

    def _held(self, node: Node) -> tuple[int, int]:
        """Return how many jobs a node runs and how many are in its list."""
        keys = self._cluster.keys
        running = int(self._cluster.client.hlen(keys.unacked(node.id, node.epoch)))
        return running, self._cluster.epochs.lengths().get(keys.node_queue(node.id), 0)

    def _failing_over(self) -> bool:
        return self._kill is not None and self._kill.loss.reowned_after_s is None

    def _look_for_failover(self) -> None:
        kill = self._kill
        if kill is None or not self._failing_over():
            return
        for event in self._cluster.events.after(kill.events_read, 0):
            kill = replace(kill, events_read=event.id)
            if event.facts.get("epoch") != kill.node.epoch:
                continue
            after_s = round(redis_time_s(event.id) - kill.at_s, 3)
            if event.kind == "node lost":
                kill = replace(kill, loss=replace(kill.loss, detected_after_s=after_s))
                self._console.print(f"{after_s:.1f} s later: its silence is noticed")
            elif event.kind == "jobs moved" and kill.loss.reowned_after_s is None:
                kill = replace(kill, loss=replace(kill.loss, reowned_after_s=after_s))
                self._console.print(f"{after_s:.1f} s later: what others had not taken yet is in new hands")
        self._kill = kill

    def _states(self, sent: Iterable[str]) -> dict[str, str]:
        return {job_id: self._local.app.AsyncResult(job_id).state for job_id in sent}

    def _tell_failure(self, outcome: dict[str, str]) -> None:
        failed = [job_id for job_id, state in outcome.items() if state == states.FAILURE]
        if failed:
            error = self._local.app.AsyncResult(failed[0]).result
            self._console.print(f"{len(failed)} jobs failed, the first with {error!r}")


def _with_ids(jobs: Sequence[Job]) -> dict[str, Job]:
    return {uuid(): job for job in jobs}
