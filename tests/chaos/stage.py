"""A failover to be done: a cluster of its own name on a shared Redis, one of whose nodes has died with jobs."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from celery import states

from benchmarks.forks import END_S, Fork, Forks
from cluster_tasks import Cluster
from cluster_tasks.broker.placement import Crash
from cluster_tasks.model import Node
from cluster_tasks.redis_store import text
from tests.broker import Broker
from tests.chaos.harness import QUICK
from tests.process.jobs import make_jobs
from tests.waiting import wait_until

VICTIM, HELD, LISTED = "victim@test", 2, 3


@dataclass
class Stage:
    """Such a cluster; its coordinators and nodes are forks."""

    broker: Broker
    cluster: Cluster
    forks: Forks
    environ: dict[str, str]
    epoch: str
    """Of the node that has died."""
    jobs: list[str]
    """Their ids: first those that it held, then those in its list."""

    @classmethod
    def set_up(cls, forks: Forks, url: str, name: str) -> Stage:
        """Let a node join, send it jobs, and let it fetch some; it never beats."""
        # Charged twice for one death, a job would be convicted.
        environ = {"CLUSTER_NAME": name, "CLUSTER_BROKER_URL": url, **QUICK, "CLUSTER_MAX_CRASH_DELIVERIES": "2"}
        broker, made = Broker(url, name), make_jobs()
        os.environ.update(environ)
        try:
            made.cluster.settings  # noqa: B018 - read while they are there.
        finally:
            for variable in environ:
                del os.environ[variable]
        epoch = broker.open(VICTIM, "llm")
        made.cluster.registry.register(Node(id=VICTIM, name="victim", epoch=epoch, serves=frozenset({"llm"})))
        queue = broker.keys.node_queue(VICTIM)
        jobs = [made.work.apply_async(queue=queue).id for _ in range(HELD + LISTED)]
        assert len(broker.fetch(VICTIM, epoch, HELD, {"llm"}).messages) == HELD
        made.app.close()
        return cls(broker, made.cluster, forks, environ, epoch, jobs)

    def lose_another(self) -> str:
        """Let a node join that never beats; return its id."""
        self.broker.open("another@test", "llm")
        return "another@test"

    def coordinator(self, node: str, **environ: str) -> Fork:
        """Start one."""
        return self.start(node, "tests.chaos.doomed", "cluster", "coordinator", "-n", f"{node}@test", **environ)

    def worker(self, node: str, app: str = "tests.process.jobs", *words: str, **environ: str) -> Fork:
        """Start a node, which coordinates with the others where no coordinator does."""
        own = ("worker", "-P", "threads", "-c", "2", "-n", f"{node}@test", "-l", "INFO")
        return self.start(node, app, *own, *words, **environ)

    def start(self, log: str, app: str, *words: str, **environ: str) -> Fork:
        """Start any of Celery's commands in this cluster."""
        name = f"{self.cluster.settings.name}-{log}"
        return self.forks.celery(name, app, *words, **{**self.environ, **environ})

    def told(self, kind: str) -> Counter[str]:
        """How often an event was told, by node."""
        return Counter(event.facts["node"] for event in self.cluster.events.latest(1000) if event.kind == kind)

    def wait_finished(self, *lost: str) -> None:
        """Wait until the failovers of these nodes, and of the first, are done and told; each is told once."""
        lost = (VICTIM, *lost)
        wait_until(lambda: self.told("jobs moved").keys() >= set(lost), END_S, f"{self.environ}: it is finished")
        assert [self.told("node lost")[node_id] for node_id in lost] == [1] * len(lost)
        assert [self.told("jobs moved")[node_id] for node_id in lost] == [1] * len(lost)
        assert not {node_id for node_id, *_ in self.cluster.epochs.fenced()} & set(lost)
        registry = self.cluster.registry
        wait_until(lambda: not {node.id for node in registry.list()} & set(lost), END_S, "the registry knows it")

    def check_where_jobs_wait(self) -> None:
        """Where no node is: what was held waits among the suspects, charged once, the rest with those that wait."""
        ids, keys = self.jobs, self.broker.keys
        assert sorted(self.broker.listed(keys.suspect_queue("llm"))) == sorted(ids[:HELD])
        assert self.broker.waiting("llm") == ids[HELD:]
        for job_id in ids:
            records: Any = self.broker.client.lrange(keys.crashes(job_id), 0, -1)
            charged = [Crash.read(record).epoch for record in records]
            assert charged == ([self.epoch] if job_id in ids[:HELD] else [])
        found = [text(key) for key in self.broker.client.scan_iter(f"{keys.name}:*")]
        assert not [key for key in found if re.search(":(remains|not_started|unacked)", key)]

    def wait_done(self) -> None:
        """Where a node is, it does every job, once."""
        client = self.broker.client
        wait_until(lambda: all(client.exists(f"celery-task-meta-{job_id}") for job_id in self.jobs), END_S, "jobs end")
        ends = [json.loads(cast(bytes, client.get(f"celery-task-meta-{job_id}")))["status"] for job_id in self.jobs]
        assert ends == [states.SUCCESS] * len(self.jobs)
        assert [client.llen(f"test:started:{job_id}") for job_id in self.jobs] == [1] * len(self.jobs)
